"""The shared LoRA files: both give the trained outputs in a stock pipeline, and their metadata are right."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lora_by_hand import lora_layers, merged_weight
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatlora_diffusion.adapter import delta as lora_update
from flatlora_diffusion.adapter.delta import shared_path
from flatlora_diffusion.config import ConfigError, RunError, TrainConfig
from flatlora_diffusion.data.dataset import load_samples, shared_words
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.families.sdxl.lora_names import kohya_name
from flatlora_diffusion.lora_files import export_pair
from flatlora_diffusion.lora_files.metadata import portable_base_name
from flatlora_diffusion.lora_files.writing import save_kohya
from flatlora_diffusion.storage.run_dir import KOHYA_COPY, LORA_FILE, RunDir
from flatlora_diffusion.training import checkpoint
from flatlora_diffusion.training.export_lora import save_lora
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train

KEY = re.compile(
    r"(lora_unet_(input_blocks|middle_block|output_blocks)_\d+_\w+|lora_te[12]_text_model_encoder_layers_\d+_\w+)"
    r"\.(lora_down\.weight|lora_up\.weight|alpha)"
)
VARIANTS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 9},
    "text encoders": {"train_text_encoder": True, "lora_alpha": 10},
    "rank stabilized": {"train_text_encoder": True, "use_rslora": True, "lora_alpha": 8},
    "mixed ranks": {"lora_block_ranks": "mid_block=7,up_blocks.0=2", "lora_alpha": 8},
    "convolutions": {"lora_target_modules": "conv", "lora_alpha": 8, "lora_block_ranks": "mid_block=2"},
    "rank 1": {"rank": 1, "lora_alpha": 3},
    "some blocks": {"lora_unet_blocks": "up_blocks.0.attentions.0", "lora_alpha": 8},
}


@pytest.fixture
def config(config: TrainConfig, tmp_path: Path) -> TrainConfig:
    names = {"output_dir": str(tmp_path / "Icons für mich"), "output_name": "my icons"}
    return config.replace(instance_prompt="an icon in the style of zwx", max_train_steps=2, **names)


def moved(config: TrainConfig, size: float = 1.0) -> TrainState:
    """A run whose LoRA looks like after long training: each layer has another B, far from 0."""
    state = prepare(config, load_samples(Path(str(config.data.instance_data_dir))).samples)
    checkpoint.start_run(state)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for index, layer in enumerate(lora_layers(getattr(state.base.pipeline, part)).values()):
            weight, rng = layer.lora_B["default"].weight, torch.Generator().manual_seed(index)
            # s B A is comparable with W in each layer.
            scale = float(layer.get_base_layer().weight.std()) / layer.scaling["default"]
            weight.data.copy_(size * scale * torch.randn(weight.shape, generator=rng))
            layer.lora_A["default"].weight.data.mul_(layer.r["default"])
            if "default" in layer.lora_magnitude_vector:
                layer.lora_magnitude_vector["default"].weight.data *= 1.2
    return state


@torch.no_grad()
def outputs(pipeline: Any) -> list[Tensor]:
    """The outputs of the UNet and both text encoders for fixed inputs."""
    embeds, _, pooled, _ = pipeline.encode_prompt("an icon of thing 0", do_classifier_free_guidance=False)
    first = pipeline.text_encoder.config.hidden_size
    rng = torch.Generator().manual_seed(0)
    latents, added = torch.randn(1, 4, 8, 8, generator=rng), {"time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    fixed, added["text_embeds"] = torch.randn(embeds.shape, generator=rng), torch.randn(pooled.shape, generator=rng)
    noise = pipeline.unet(latents, torch.tensor([500]), fixed, added_cond_kwargs=added).sample
    return [noise, embeds[..., :first], torch.cat([embeds[..., first:].flatten(), pooled.flatten()])]


def stock(base: Path, file: Path | None = None) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    if file is not None:
        pipeline.load_lora_weights(file)
    return pipeline


def apart(first: list[Tensor], second: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(first, second, strict=True)]


SHORT = [("alpha", "fp16"), ("text encoders", "fp16"), ("convolutions", "fp16"), ("mixed ranks", "fp32")]
LONG = [cell for cell in product(VARIANTS, ("fp16", "fp32")) if cell not in SHORT]


@pytest.mark.parametrize(("name", "dtype"), [*SHORT, *(pytest.param(*cell, marks=pytest.mark.long) for cell in LONG)])
def test_a_stock_pipeline_computes_what_was_trained_from_either_file(
    config: TrainConfig, base: Path, name: str, dtype: str
) -> None:
    state = moved(config.replace(**VARIANTS[name], save_dtype=dtype))
    proof = save_lora(state, state.run.folder, step=2)
    trained, plain = outputs(state.base.pipeline), outputs(stock(base))
    effects = apart(plain, trained)
    assert min(effects[: 3 if state.config.adapter.train_text_encoder else 1]) > 0.1, "a no-op could pass"
    assert proof["files"] == ["my-icons.safetensors", LORA_FILE]
    low, high = (1e-5, 2e-3) if dtype == "fp16" else (0, 1e-6)
    assert low <= proof["largest_error"] < high
    for file in proof["files"]:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(target|adapter|key).*")
            loaded = stock(base, state.run.folder / file)
        errors = apart(outputs(loaded), trained)
        assert max(errors) < (1e-2 if dtype == "fp16" else 1e-5), file
        assert max(errors) < 0.02 * max(effects)


@pytest.mark.parametrize("name", ["text encoders", "mixed ranks", "convolutions"])
def test_diffusers_restores_it_without_its_metadata_too(config: TrainConfig, base: Path, name: str) -> None:
    """As in older versions, which do not read the metadata."""
    state = moved(config.replace(**VARIANTS[name], save_dtype="fp32"))
    save_lora(state, state.run.folder, step=2)
    path = state.run.folder / "bare.safetensors"
    save_file(load_file(state.run.folder / LORA_FILE), path, {"format": "pt"})
    assert max(apart(outputs(stock(base, path)), outputs(state.base.pipeline))) < 1e-5


def test_dora_is_exact_for_diffusers_and_a_plain_lora_for_others(config: TrainConfig, base: Path) -> None:
    state = moved(config.replace(use_dora=True, lora_alpha=8))
    proof = save_lora(state, state.run.folder, step=2)
    trained, plain = outputs(state.base.pipeline)[0], outputs(stock(base))[0]
    assert float((plain - trained).norm() / trained.norm()) > 0.1
    exact = outputs(stock(base, state.run.folder / LORA_FILE))[0]
    assert float((exact - trained).norm() / trained.norm()) < 2e-3
    kohya = load_file(state.run.folder / "my-icons.safetensors")
    assert all(KEY.fullmatch(key) for key in kohya)
    folded = outputs(stock(base, state.run.folder / "my-icons.safetensors"))[0]
    # This base's layers are narrower than FOLD_RANK, so the SVD is exact.
    assert float((folded - trained).norm() / trained.norm()) < 5e-3
    assert proof.get("missed_by_plain_lora", 0) < 1e-4


def test_the_error_of_folding_a_dora_is_logged(
    config: TrainConfig, base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_update, "FOLD_RANK", 5)
    state = moved(config.replace(use_dora=True))
    with caplog.at_level(logging.WARNING):
        proof = save_lora(state, state.run.folder, step=2, is_end=True)
    missed = proof["missed_by_plain_lora"]
    assert 0.05 < missed < 0.9
    state.run.add_event({"event": "proof", **proof})
    said = f"missing {100 * missed:.1f} %"
    beside = json.loads((state.run.folder / "my-icons.json").read_text(encoding="utf-8"))
    assert said in beside["description"]
    with safe_open(state.run.folder / "my-icons.safetensors", "pt") as file:
        assert all(said in file.metadata()[name] for name in ("ss_training_comment", "modelspec.description"))
    assert re.search(rf"my-icons\.safetensors .* {100 * missed:.1f} %", caplog.text)
    with safe_open(state.run.folder / "my-icons.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "5"


@pytest.mark.parametrize("name", [*VARIANTS, "bf16"])
def test_the_arithmetic_of_the_file(config: TrainConfig, name: str) -> None:
    """W + alpha / r * up @ down of every module is the weight by hand."""
    state = moved(config.replace(**VARIANTS.get(name, {}), save_dtype="bf16" if name == "bf16" else "fp32"))
    save_lora(state, state.run.folder, step=2)
    tensors = load_file(state.run.folder / "my-icons.safetensors")
    seen = set()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for path, layer in lora_layers(getattr(state.base.pipeline, part)).items():
            module = kohya_name(part, shared_path(part, path), state.base.denoiser.config.layers_per_block)
            down, up, alpha = (
                tensors[f"{module}.{x}"].float() for x in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            weight = layer.get_base_layer().weight
            change = float(alpha) / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
            expected = merged_weight(layer) - weight
            assert float((change - expected).norm() / expected.norm()) < (2e-2 if name == "bf16" else 1e-6)
            seen.add(module)
    padding = {key.split(".")[0] for key in tensors} - seen
    assert len(padding) == (2 if name == "some blocks" else 0)
    for module in padding:
        assert not tensors[f"{module}.lora_up.weight"].any()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_schema_of_the_kohya_file(config: TrainConfig, dtype: str) -> None:
    state = moved(config.replace(train_text_encoder=True, lora_target_modules="conv", save_dtype=dtype, lora_alpha=6))
    save_lora(state, state.run.folder, step=2)
    path = state.run.folder / "my-icons.safetensors"
    tensors = load_file(path)
    assert [key for key in tensors if not KEY.fullmatch(key)] == []
    modules = {key.split(".")[0] for key in tensors}
    assert len(tensors) == 3 * len(modules)
    assert {value.dtype for value in tensors.values()} == {DTYPES[dtype]}
    assert {value.dtype for value in load_file(path.with_name(LORA_FILE)).values()} == {DTYPES[dtype]}
    for prefix in ("lora_unet_", "lora_te1_", "lora_te2_"):
        assert len({float(tensors[f"{name}.alpha"]) for name in modules if name.startswith(prefix)}) == 1
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length < 2**20
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert all(isinstance(value, str) and value for value in metadata.values())
    digest = hashlib.sha256(raw[8 + length :]).hexdigest()
    assert metadata["sshs_model_hash"] == digest
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"
    assert (
        metadata.items()
        >= {
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.title": "my-icons",
            "modelspec.trigger_phrase": "an icon in the style of zwx",
            "modelspec.prediction_type": "epsilon",
            "ss_output_name": "my-icons",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "4",
            "ss_network_alpha": "6.0",
            "ss_v2": "False",
            "ss_clip_skip": "2",
            "ss_v_parameterization": "False",
            "ss_zero_terminal_snr": "False",
            "ss_steps": "2",
            "ss_epoch": "1",
            "ss_num_train_images": "3",
            "ss_training_comment": "flatlora-diffusion: method flat-lora, sigma 0.1, constant schedule, "
            "low-rank draws",
            "flatlora.config_sha256": hashlib.sha256(state.run.config_file.read_bytes()).hexdigest(),
            "flatlora.manifest_sha256": hashlib.sha256(state.run.manifest_file.read_bytes()).hexdigest(),
        }.items()
    )
    assert float(metadata["ss_training_started_at"]) <= float(metadata["ss_training_finished_at"])
    assert re.fullmatch(r"[0-9a-f]{8}", metadata["sshs_legacy_hash"])
    with safe_open(path.with_name(LORA_FILE), "pt") as file:
        assert set(file.metadata()) == {"format", "lora_adapter_metadata"}


def test_the_legacy_hash_is_of_64_kib_behind_the_first_mebibyte(tmp_path: Path) -> None:
    tensors = {"a.lora_down.weight": torch.randn(2, 300_000), "a.alpha": torch.tensor(2.0)}
    said = {"ss_steps": "3", "modelspec.title": "t", "format": "pt"}
    save_kohya(tmp_path / "a.safetensors", lambda: sorted(tensors.items()), said)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    own = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    save_file(tensors, tmp_path / "b.safetensors", own)
    part = (tmp_path / "b.safetensors").read_bytes()[0x100000:0x110000]
    assert len(part) == 0x10000
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(part).hexdigest()[:8]


@pytest.mark.skipif(sys.platform == "win32", reason="no umask there")
def test_file_permissions_follow_the_umask(config: TrainConfig) -> None:
    state = moved(config)
    old = os.umask(0o027)
    try:
        save_lora(state, state.run.folder, step=2)
    finally:
        os.umask(old)
    for name in ("my-icons.safetensors", LORA_FILE):
        assert (state.run.folder / name).stat().st_mode & 0o777 == 0o640


def without_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.endswith(".alpha")}


def with_encoders_swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    swapped = {"lora_te1_": "lora_te2_", "lora_te2_": "lora_te1_"}
    return {swapped.get(key[:9], key[:9]) + key[9:]: value for key, value in tensors.items()}


def without_text_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("_text_model_", "_"): value for key, value in tensors.items()}


@pytest.mark.parametrize("damage", [without_alphas, with_encoders_swapped, without_text_model])
def test_a_wrong_file_is_detected(
    config: TrainConfig, base: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    state = moved(config.replace(train_text_encoder=True, lora_alpha=10))
    save_lora(state, state.run.folder, step=2)
    path = state.run.folder / "my-icons.safetensors"
    save_file(damage(load_file(path)), path)
    try:
        errors = apart(outputs(stock(base, path)), outputs(state.base.pipeline))
    except (RuntimeError, IndexError):  # for shapes that do not fit, and names that diffusers cannot parse
        assert damage is not without_alphas
        return
    assert max(errors) > 0.1


def test_a_disk_that_stores_other_bytes_is_detected(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    state = moved(config.replace(lora_alpha=8))
    names = ["my-icons.safetensors", LORA_FILE]
    for name in names:

        def bad(path: Path, name: str = name) -> dict[str, Tensor]:
            tensors = load_file(path)
            if Path(path).name == name:
                key = sorted(key for key in tensors if "lora_up" in key or "lora_B" in key)[3]
                tensors[key] = tensors[key] * 1.01
            return tensors

        with monkeypatch.context() as patch:
            patch.setattr(export_pair, "load_file", bad)
            with pytest.raises(RunError, match=f"{name}.*unet"):
                save_lora(state, state.run.folder, step=2)
    save_lora(state, state.run.folder, step=2)


def test_a_lora_that_is_not_finite_is_refused(config: TrainConfig) -> None:
    state = moved(config)
    next(iter(lora_layers(state.base.denoiser).values())).lora_B["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"unet\.down_blocks.*--learning_rate"):
        save_lora(state, state.run.folder, step=2)
    assert not (state.run.folder / "my-icons.safetensors").exists()


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_a_very_small_or_large_lora_fits_into_fp16(config: TrainConfig, size: float) -> None:
    state = moved(config, size)
    assert save_lora(state, state.run.folder, step=2)["largest_error"] < 2e-3
    for name in ("my-icons.safetensors", LORA_FILE):
        assert all(bool(value.isfinite().all()) for value in load_file(state.run.folder / name).values())


# A whole run


def test_a_run_and_its_checkpoints_have_both_files_and_their_sidecars(
    config: TrainConfig, tmp_path: Path, icons: Path
) -> None:
    chosen = config.replace(
        checkpointing_steps=1, validation_prompt="a fox", num_validation_images=2, output_kohya_format=True
    )
    path = train(chosen)
    run = RunDir(path.parent)
    for folder in (run.folder, *run.checkpoints()):
        names = {file.name for file in folder.glob("*.safetensors")}
        assert names - {"state.safetensors"} == {"my-icons.safetensors", LORA_FILE, KOHYA_COPY}
        assert (folder / KOHYA_COPY).read_bytes() == (folder / "my-icons.safetensors").read_bytes()
    (proof,) = [event for event in run.events() if event["event"] == "proof"]
    assert 0 < proof["largest_error"] < 2e-3
    (change,) = [event for event in run.events() if event["event"] == "image_change"]
    assert change["levels"] > 0
    side = json.loads((run.folder / "my-icons.json").read_text(encoding="utf-8"))
    assert side["activation text"] == "an icon in the style of zwx"
    assert side["sd version"] == "SDXL"
    with Image.open(run.folder / "my-icons.png") as preview, Image.open(run.images / "step-2-0.png") as last:
        assert preview.tobytes() == last.tobytes()
    state = load_file(run.checkpoints()[-1] / "state.safetensors")
    assert {value.dtype for name, value in state.items() if name.startswith("trained.")} == {torch.float32}
    for file in (run.folder / "my-icons.safetensors", run.folder / "my-icons.json", path):
        text = file.read_bytes()
        for private in (tmp_path.name, icons.name, "icons", "icon-0", "thing", "Icons f"):
            spoken = text.replace(b"my-icons", b"")
            assert private.encode() not in spoken, (file.name, private)


def test_a_new_run_moves_the_files_of_an_earlier_one_aside_whatever_their_name(config: TrainConfig) -> None:
    folder = train(config).parent
    names = {"my-icons.safetensors", "my-icons.json", LORA_FILE}
    first = {name: (folder / name).read_bytes() for name in names}
    (folder / "base.safetensors").write_bytes(b"the user's")
    (folder / "foxes.json").write_text("also the user's")
    train(config.replace(output_name="foxes", seed=4))
    assert {name: (folder / "earlier-1" / name).read_bytes() for name in names} == first
    assert (folder / "earlier-1" / "foxes.json").read_text() == "also the user's"
    assert (folder / "base.safetensors").read_bytes() == b"the user's"
    assert not (folder / "my-icons.safetensors").exists()
    assert (folder / "foxes.safetensors").exists()


def test_a_resumed_run_does_not_overwrite_other_files(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    folder = train(config.replace(checkpointing_steps=1)).parent
    (folder / "foxes.safetensors").write_bytes(b"the user's")
    again = config.replace(checkpointing_steps=1, resume_from_checkpoint="latest", output_name="foxes")
    with caplog.at_level(logging.WARNING):
        train(again)
    assert (folder / "foxes-earlier-1.safetensors").read_bytes() == b"the user's"
    assert re.search(r"foxes\.safetensors.*foxes-earlier-1\.safetensors", caplog.text)
    train(again)
    assert not (folder / "foxes-earlier-2.safetensors").exists(), "it was written by this program"


def test_the_lora_of_another_run_is_not_overwritten(config: TrainConfig, tmp_path: Path) -> None:
    """The folder of the next run holds the file alone, without an earlier run."""
    other = train(config.replace(output_name="foxes")).parent / "foxes.safetensors"
    folder = tmp_path / "next"
    folder.mkdir()
    shutil.copy(other, folder)
    named = config.replace(output_name="foxes", output_dir=str(folder))
    with pytest.raises(ConfigError, match=r"init_lora=.* is the file that the run would write"):
        train(named.replace(init_lora=str(folder / "foxes.safetensors")))
    train(named.replace(seed=4))
    assert (folder / "foxes-earlier-1.safetensors").read_bytes() == other.read_bytes()
    assert (folder / "foxes.safetensors").read_bytes() != other.read_bytes()


def test_an_untrained_lora_is_an_error_unless_requested(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    still = config.replace(lr_scheduler="linear", lr_warmup_steps=100, max_train_steps=1, checkpointing_steps=1)
    with pytest.raises(RunError, match="--learning_rate and --lr_warmup_steps"):
        train(still)
    run = RunDir(Path(config.run.output_dir))
    assert run.checkpoints(), "a checkpoint during warm-up is no error"
    assert not list(run.folder.glob("*.safetensors"))
    with caplog.at_level(logging.WARNING):
        train(config.replace(learning_rate=0.0, max_train_steps=1))
    assert "the LoRA is zero" in caplog.text


def test_the_base_is_named_without_the_user_s_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "sdxl-tune.safetensors").touch()
    for given, name in (
        ("tiny", "tiny"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        (str(tmp_path / "sdxl-tune.safetensors"), "sdxl-tune.safetensors"),
        (str(tmp_path / "folder"), None),
    ):
        assert portable_base_name(TrainConfig().replace(pretrained_model_name_or_path=given)) == name


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("my icons", "my-icons"),
        ("Größe/..\\x:<b>", "Größe-..-x-b"),
        ("config", "lora-config"),
        ("pytorch_lora_weights", "lora-pytorch_lora_weights"),
        ("CON", "lora-CON"),
        ("...", "lora"),
        ("v1.5", "v1.5"),
        ("x" * 300, "x" * 80),
        (None, "run-a"),
    ],
)
def test_names_of_files(given: str | None, name: str, tmp_path: Path) -> None:
    assert RunDir(tmp_path / "run a").lora_name(given) == name


@pytest.mark.parametrize(
    ("captions", "shared"),
    [
        (
            ["a TOK icon of a dog, in the style of TOK", "a TOK icon of soap, in the style of TOK"],
            "a TOK icon, in the style of TOK",
        ),
        (["a photo of the zwx cat", "a photo of the old dog"], "a photo"),
        (["zwx, a red fox", "zwx, a blue whale at sea"], "zwx"),
        (["a fox", "a whale at sea"], ""),
        (["fox", "whale"], ""),
        (["the same", "the same"], "the same"),
        (["a TOK icon of a dog"], ""),
        (["TOK", "TOK fox TOK"], "TOK"),
    ],
)
def test_trigger_words_are_what_all_captions_begin_and_end_with(captions: list[str], shared: str) -> None:
    assert shared_words(captions) == shared


def test_captioned_images_leave_their_shared_words_in_the_sidecar(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    captioned = Path(shutil.copytree(icons, tmp_path / "captioned"))
    for number, image in enumerate(sorted(captioned.glob("*.png"))):
        image.with_suffix(".txt").write_text(f"a TOK icon of thing {number}, in the style of TOK")
    folder = train(config.replace(instance_prompt=None, instance_data_dir=str(captioned))).parent
    sidecar = json.loads((folder / "my-icons.json").read_text(encoding="utf-8"))
    assert sidecar["activation text"] == "a TOK icon of thing, in the style of TOK"
