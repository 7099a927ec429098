"""`export` and `import`: the same update in every layout and direction; nothing is overwritten without the flag."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layouts import ALPHAS, adapted, as_diffusers_loads, comfyui, deltas, factors, kohya, lycoris, peft, saved
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.storage.run_dir import RunDir


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return adapted(base)


@pytest.fixture
def kohya_file(pipeline: Any, tmp_path: Path) -> Path:
    metadata = {
        "ss_steps": "7",
        "sshs_model_hash": "0" * 64,
        "modelspec.trigger_phrase": "zwx",
        "ss_output_name": "fox",
    }
    return saved(kohya(factors(pipeline)), tmp_path / "other.safetensors", **metadata)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0.1
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), ("fp16", 1e-3), ("bf16", 1e-2)])
def test_diffusers_loads_every_layer_of_an_imported_file(
    pipeline: Any, base: Path, kohya_file: Path, dtype: str | None, tolerance: float
) -> None:
    arguments = ["import", str(kohya_file), "--base", str(base)]
    assert main([*arguments, *(["--dtype", dtype] if dtype else [])]) == 0
    path = kohya_file.with_name("other_diffusers.safetensors")
    kind = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {value.dtype for value in load_file(path).values()} == {kind}
    assert_close(as_diffusers_loads(base, path), deltas(pipeline), tolerance)


def test_diffusers_loads_every_layer_of_an_exported_kohya_file(pipeline: Any, base: Path, tmp_path: Path) -> None:
    path = saved(peft(factors(pipeline), ALPHAS), tmp_path / "x.safetensors")
    assert main(["export", str(path), "--base", str(base), "--name", "fox"]) == 0
    written = tmp_path / "fox_kohya.safetensors"
    assert_close(as_diffusers_loads(base, written), deltas(pipeline), 1e-6)
    names = load_file(written).keys()
    assert all(name.startswith(("lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_")) for name in names)
    assert not any("down_blocks" in name or "up_blocks" in name for name in names)
    assert metadata(written)["ss_output_name"] == metadata(written)["modelspec.title"] == "fox"
    assert metadata(written)["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.parametrize("verb", ["export", "import"])
@pytest.mark.parametrize("layout", ["comfyui", "lycoris"])
def test_key_names_that_few_tools_support_are_converted(
    pipeline: Any, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, verb: str, layout: str
) -> None:
    tensors = {"comfyui": comfyui, "lycoris": lycoris}[layout](factors(pipeline), ALPHAS)
    small = {"comfyui": "diffusion_model.out.2.diff_b", "lycoris": "lycoris_conv_norm_out.w_norm"}[layout]
    path = saved(tensors | {small: torch.ones(4)}, tmp_path / "x.safetensors")
    written = tmp_path / "y.safetensors"
    assert main([verb, str(path), "--base", str(base), "--output", str(written)]) == 0
    expected = deltas(pipeline)
    if layout == "lycoris":
        expected = {name: value for name, value in expected.items() if name.startswith("unet.")}
    assert_close(as_diffusers_loads(base, written), expected, 1e-6)
    assert "1 change(s) of biases and norms" in caplog.text
    assert "belong to no layer" not in caplog.text


def test_exporting_and_importing_gives_the_same_file(pipeline: Any, base: Path, tmp_path: Path) -> None:
    first = saved(peft(factors(pipeline), ALPHAS), tmp_path / "x.safetensors")
    for layout, source, target in (("kohya", "x", "y"), ("diffusers", "y", "z")):
        output = str(tmp_path / f"{target}.safetensors")
        source_file = str(tmp_path / f"{source}.safetensors")
        assert main(["export", source_file, "--layout", layout, "--base", str(base), "--output", output]) == 0
    before, after = load_file(first), load_file(tmp_path / "z.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_metadata_that_still_apply_are_copied(base: Path, kohya_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["export", str(kohya_file), "--layout", "both", "--base", str(base), "--output", str(output)]
    assert main(arguments) == 0
    for layout in ("kohya", "diffusers"):
        kept = metadata(output / f"other_{layout}.safetensors")
        assert (kept["ss_steps"], kept["modelspec.trigger_phrase"], kept["ss_output_name"]) == ("7", "zwx", "fox")
        assert kept.get("sshs_model_hash") != "0" * 64
    assert "lora_adapter_metadata" not in metadata(output / "other_kohya.safetensors")
    settings = json.loads(metadata(output / "other_diffusers.safetensors")["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["unet.lora_alpha"]


def test_metadata_about_the_author_s_machine_or_images_are_dropped(pipeline: Any, base: Path, tmp_path: Path) -> None:
    foreign: dict[str, Any] = {
        "ot_branch": "omi_format",
        "ot_config": {"token": "hf_secret"},
        "ss_dataset_dirs": {"10_jane": {"n_repeats": 10}},
        "ss_reg_dataset_dirs": {"1_woman": {"n_repeats": 1}},
        "ss_sd_model_name": "/home/jane/bases/sdxl-tune.safetensors",
        "ss_vae_name": r"D:\jane\vae.safetensors",
        "ss_new_vae_name": "madebyollin/sdxl-vae-fp16-fix",
        "ss_network_args": {"weights": "/home/jane/loras/old.safetensors"},
        "ss_training_comment": r"from C:\Users\jane",
        "modelspec.author": "~/jane",
        "modelspec.description": "<b>red/blue</b> foxes, see https://example.org/foxes/1",
        "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQ",
        "ss_tag_frequency": {"10_zwx": {r"\m/": 2, r"fox \(animal\)": 1}},
        "ss_bucket_info": {"buckets": {"0": {"resolution": [1024, 1024], "count": 12}}},
    }
    path = saved(kohya(factors(pipeline)), tmp_path / "x.safetensors", **foreign)
    assert main(["export", str(path), "--layout", "both", "--base", str(base)]) == 0
    assert main(["resize", str(path), "--rank", "2", "--base", str(base)]) == 0
    for end in ("kohya", "diffusers", "rank2"):
        kept = metadata(tmp_path / f"x_{end}.safetensors")
        assert kept.pop("ss_sd_model_name") == "sdxl-tune.safetensors"
        assert kept.pop("ss_vae_name") == "vae.safetensors"
        assert kept.pop("ss_new_vae_name") == "madebyollin/sdxl-vae-fp16-fix", "a hub id is no path"
        for key in ("modelspec.description", "modelspec.thumbnail"):
            assert kept.pop(key) == foreign[key]
        assert not kept.keys() & foreign.keys()
        assert not any(word in str(kept) for word in ("jane", "hf_secret", "woman", "animal", "zwx"))


def test_the_metadata_of_a_kohya_file_name_its_format(pipeline: Any, base: Path, tmp_path: Path) -> None:
    foreign = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "True",
        "ss_network_module": "lycoris.kohya",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
    }
    path = saved(peft(factors(pipeline), ALPHAS), tmp_path / "x.safetensors", **foreign)
    assert main(["export", str(path), "--base", str(base)]) == 0
    written = metadata(tmp_path / "x_kohya.safetensors")
    assert {key: written[key] for key in foreign} == {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    }


def test_names_are_sanitized_for_files_and_prompts(pipeline: Any, base: Path, tmp_path: Path) -> None:
    foreign = {"ss_output_name": "../../evil:<x>", "modelspec.title": "../../evil:<x>"}
    (tmp_path / "in").mkdir()
    path = saved(kohya(factors(pipeline)), tmp_path / "in" / "x.safetensors", **foreign)
    start = ["export", str(path), "--base", str(base), "--layout"]
    assert main([*start, "both"]) == 0
    for given, name in (("My: LoRA?", "My-LoRA"), ("../up", "up")):
        assert main([*start, "kohya", "--name", given]) == 0
        written = metadata(tmp_path / "in" / f"{name}_kohya.safetensors")
        assert written["ss_output_name"] == written["modelspec.title"] == name
    for layout in ("kohya", "diffusers"):
        written = metadata(tmp_path / "in" / f"x_{layout}.safetensors")
        assert written["ss_output_name"] == written["modelspec.title"] == "evil-x"
    assert os.listdir(tmp_path) == ["in"]


def test_layers_of_different_ranks_and_alphas_are_exported_exactly(pipeline: Any, base: Path, tmp_path: Path) -> None:
    tensors = kohya(factors(pipeline))
    names = sorted(name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha"))
    for name in names[::3]:
        tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:1]
        tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][:, :1]
        tensors[f"{name}.alpha"] = torch.tensor(2.5)
    path = saved(tensors, tmp_path / "x.safetensors")
    assert main(["export", str(path), "--layout", "both", "--base", str(base)]) == 0
    in_kohya = as_diffusers_loads(base, tmp_path / "x_kohya.safetensors")
    assert_close(in_kohya, as_diffusers_loads(base, tmp_path / "x_diffusers.safetensors"), 1e-5)
    assert_close(
        {name: value for name, value in in_kohya.items() if name.startswith("text_encoder.")},
        {
            f"text_encoder.{module}": _by_hand(tensors, f"lora_te1_{module.replace('.', '_')}")
            for module in factors(pipeline)["text_encoder"]
        },
        1e-5,
    )


def _by_hand(tensors: dict[str, Tensor], name: str) -> Tensor:
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    return (tensors[f"{name}.alpha"] / len(down) * up @ down).detach()


def test_layers_without_a_common_name_are_left_out_with_a_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = adapted(base, ("to_q", "conv_in", "time_embedding.linear_1"), ())
    path = saved(peft(factors(whole), ALPHAS), tmp_path / "x.safetensors")
    assert main(["export", str(path), "--layout", "both", "--base", str(base)]) == 0
    assert "lacks 2 layer(s)" in caplog.text
    assert_close(as_diffusers_loads(base, tmp_path / "x_diffusers.safetensors"), deltas(whole), 1e-6)
    assert not any("conv_in" in name for name in load_file(tmp_path / "x_kohya.safetensors"))


def test_a_lora_of_one_text_encoder_gets_the_layers_that_identify_its_base(
    pipeline: Any, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"text_encoder": factors(pipeline)["text_encoder"]}
    path = saved(peft(text, ALPHAS), tmp_path / "x.safetensors")
    assert main(["export", str(path), "--layout", "both", "--base", str(base)]) == 0
    assert caplog.text.count("has no UNet layers; adding 2 of zeros") == 1
    written = tmp_path / "x_kohya.safetensors"
    expected = {name: value for name, value in deltas(pipeline).items() if name.startswith("text_encoder.")}
    found = as_diffusers_loads(base, written)
    zeros = {name: found.pop(name) for name in list(found) if name.startswith("unet.")}
    assert len(zeros) == 2
    assert not any(bool(value.any()) for value in zeros.values())
    assert_close(found, expected, 1e-6)
    assert not any(name.startswith("unet") for name in load_file(tmp_path / "x_diffusers.safetensors"))
    capsys.readouterr()
    assert main(["inspect", str(written), "--base", str(base), "--json"]) == 0
    tools = {row["tool"]: row for row in json.loads(capsys.readouterr().out)["tools"]}
    for name in ("InvokeAI", "Draw Things"):
        assert (tools[name]["layers"], tools[name]["note"]) == (len(expected) + 2, "")


def error_message(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_an_unwritable_output_is_an_error_of_one_sentence(
    capsys: pytest.CaptureFixture[str], base: Path, kohya_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "named.safetensors").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for verb in ("import", "resize"):
        start = [verb, str(kohya_file), "--base", str(base), "--output"]
        for more in ([], ["--overwrite"]):
            error = error_message(capsys, [*start, str(tmp_path / "named.safetensors"), *more])
            assert (
                error == f"error: {tmp_path / 'named.safetensors'} is a folder; give a .safetensors file as --output"
            )
        assert "cannot be written: " in error_message(capsys, [*start, str(tmp_path / "file")])
    start = ["export", str(kohya_file), "--base", str(base), "--output"]
    for bad in ("/proc/x.safetensors", str(tmp_path / "file" / "y.safetensors"), str(tmp_path / "file")):
        assert "cannot be written: " in error_message(capsys, [*start, bad])
    both = [*start, str(tmp_path / "x.safetensors"), "--layout", "both"]
    assert "--layout both" in error_message(capsys, both)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("verb", "name"), [("import", "_diffusers"), ("export", "_kohya"), ("resize", "_rank4")])
def test_a_folder_stands_for_the_lora_in_it(
    base: Path, pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, name: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    saved(peft(factors(pipeline), ALPHAS), run / "pytorch_lora_weights.safetensors")
    for output in (tmp_path / "there", tmp_path / "new"):
        (tmp_path / "there").mkdir(exist_ok=True)
        assert main([verb, str(run), "--base", str(base), "--output", f"{output}{os.sep}"]) == 0
        assert os.listdir(output) == [f"pytorch_lora_weights{name}.safetensors"]
    assert os.listdir(run) == ["pytorch_lora_weights.safetensors"]
    (run / "pytorch_lora_weights.safetensors").rename(run / "other.safetensors")
    assert "is a folder without pytorch_lora_weights.safetensors" in error_message(capsys, [verb, str(run)])


@pytest.mark.parametrize("place", ["run", "run/checkpoint-2"])
def test_the_error_for_a_dora_names_the_plain_lora_beside_it(
    pipeline: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    run = RunDir(tmp_path / "run")
    run.config_file.write_text('{"output_name": "my foxes"}')
    run.add_event({"event": "finished"})
    name = "unet.mid_block.attentions.0.proj_in"
    dora = peft(factors(pipeline), ALPHAS) | {f"{name}.lora_magnitude_vector": torch.ones(8)}
    path = saved(dora, folder / "pytorch_lora_weights.safetensors")
    verbs = {
        "export": ["export", str(path), "--base", str(base)],
        "merge": ["merge", "--lora", str(path.parent), "--base", str(base), "--output", str(tmp_path / "merged")],
    }
    for arguments in verbs.values():
        assert error_message(capsys, arguments).endswith("is not portable")
    plain = saved(kohya(factors(pipeline)), folder / "my-foxes.safetensors")
    for arguments in verbs.values():
        error = error_message(capsys, arguments)
        assert "contains DoRA" in error
        assert error.endswith(f"; use {plain}, its plain LoRA")


def test_wrong_input_is_an_error_of_one_sentence_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], base: Path, kohya_file: Path, tmp_path: Path
) -> None:
    assert "file is missing" in error_message(capsys, ["export"])
    assert "does not exist" in error_message(capsys, ["import", str(tmp_path / "nowhere.safetensors")])
    assert "--base" in error_message(capsys, ["import", str(kohya_file)])
    zero = {name: torch.zeros_like(value) for name, value in load_file(kohya_file).items() if "alpha" not in name}
    empty = saved(zero, tmp_path / "zero.safetensors")
    assert "all updates of the LoRA are zero" in error_message(capsys, ["export", str(empty), "--base", str(base)])
    assert sorted(os.listdir(tmp_path)) == ["other.safetensors", "zero.safetensors"]


@pytest.mark.parametrize("verb", ["import", "export", "resize", "inspect", "merge"])
def test_a_hostile_file_is_an_error_of_one_sentence_in_every_verb(
    capsys: pytest.CaptureFixture[str], base: Path, kohya_file: Path, tmp_path: Path, verb: str
) -> None:
    path = tmp_path / "x.safetensors"
    rest = ["--base", str(base)] if verb != "merge" else ["--base", str(base), "--output", str(tmp_path / "out")]
    given = ["--lora", str(path)] if verb == "merge" else [str(path)]
    name = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_k"
    torch.save({"a": torch.zeros(2)}, path)
    assert "zip archive" in error_message(capsys, [verb, *given, *rest])
    path.write_bytes((100 * 10**9).to_bytes(8, "little") + b"{}")
    assert "another format or damaged" in error_message(capsys, [verb, *given, *rest])
    saved({f"{name}.lora_down.weight": torch.ones(2, 768), f"{name}.lora_up.weight": torch.ones(16, 2)}, path)
    assert "is a LoRA for Stable Diffusion 1, not for SDXL" in error_message(capsys, [verb, *given, *rest])
    broken = load_file(kohya_file)
    next(value for name, value in broken.items() if "lora_up" in name)[0] = float("nan")
    saved(broken, path)
    assert "contains NaN" in error_message(capsys, [verb, *given, *rest])
    assert sorted(os.listdir(tmp_path)) == ["other.safetensors", "x.safetensors"]
