"""`generate`: images by LoRA and strength, restoration of the base, and the text in the files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from lora_layouts import as_diffusers_loads, deltas
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageFont
from safetensors.torch import load_file, save_file

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import ConfigError, GenerateConfig, ModelConfig, RunError
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.sampling import generate_images
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.gallery.gallery import LoraRow, generate
from flatlora_diffusion.gallery.grid import labelled_grid, wrapped
from flatlora_diffusion.lora_files.loading import lora_scale, loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile, parse_lora

FILE = "pytorch_lora_weights.safetensors"


def save_lora(base: Path, folder: Path, seed: int, text: bool) -> Path:
    """A random LoRA of clear effect on the UNet and, with `text`, both text encoders, as diffusers saves it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    states: dict[str, Any] = {}
    for part in ("unet", "text_encoder", "text_encoder_2") if text else ("unet",):
        model = getattr(pipeline, part)
        targets = ["to_q", "to_k", "to_v", "to_out.0"] if part == "unet" else ["q_proj", "v_proj", "out_proj"]
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        state = get_peft_model_state_dict(model)
        draw = torch.Generator().manual_seed(seed)
        states[part] = {name: torch.randn(value.shape, generator=draw) for name, value in sorted(state.items())}
    layers = {f"{part}_lora_layers": state for part, state in states.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers)
    return folder / FILE


@pytest.fixture(scope="module")
def style(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with a part for the text encoders."""
    return save_lora(base, tmp_path_factory.mktemp("loras") / "style", seed=1, text=True)


@pytest.fixture(scope="module")
def face(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the UNet alone."""
    return save_lora(base, tmp_path_factory.mktemp("loras") / "face", seed=2, text=False)


@pytest.fixture(scope="module")
def sdxl(base: Path) -> Sdxl:
    return load_sdxl(ModelConfig(pretrained_model_name_or_path=str(base)), torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def sdxl_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test that uses the pipeline must leave it bit for bit as it was."""
    if "sdxl" not in request.fixturenames:
        yield
        return
    pipeline = request.getfixturevalue("sdxl").pipeline
    before = weights(pipeline)
    lengths = len(pipeline.tokenizer), len(pipeline.tokenizer_2)
    yield
    after = weights(pipeline)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lengths == (len(pipeline.tokenizer), len(pipeline.tokenizer_2))


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    states = {part: getattr(pipeline, part).state_dict() for part in parts}
    return {f"{part}.{name}": value.clone() for part, state in states.items() for name, value in state.items()}


def draw(
    sdxl: Sdxl, *loras: LoraFile, strength: float = 1.0, merge: bool = False, prompt: str = "a fox"
) -> Image.Image:
    with loras_loaded(sdxl.pipeline, loras), lora_scale(sdxl.pipeline, loras, strength, merge):
        return generate_images(sdxl, [prompt], [0], ImageSettings(32, 2))[0]


def plain(sdxl: Sdxl, prompt: str = "a fox", seed: int = 0) -> Image.Image:
    return generate_images(sdxl, [prompt], [seed], ImageSettings(32, 2))[0]


def stock(base: Path, prompt: str = "a fox") -> tuple[Any, dict[str, Any]]:
    """A pipeline that knows nothing of us, and the call that draws what `plain` draws."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 5.0}
    return pipeline, {**call, "prompt": prompt, "generator": torch.Generator().manual_seed(0)}


def distance(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two images, in levels of 255."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def config(base: Path, out: Path, **settings: Any) -> GenerateConfig:
    model = ModelConfig(pretrained_model_name_or_path=str(base))
    return GenerateConfig(**{"num_inference_steps": 1, "model": model, "output_dir": str(out), **settings})


def test_the_base_and_full_strength_are_those_of_a_stock_pipeline(sdxl: Sdxl, base: Path, style: Path) -> None:
    pipeline, call = stock(base)
    expected = pipeline(**call).images[0]
    assert distance(plain(sdxl), expected) <= 1
    pipeline.load_lora_weights(style)
    expected = pipeline(**{**call, "generator": torch.Generator().manual_seed(0)}).images[0]
    drawn = draw(sdxl, LoraFile(style))
    assert distance(drawn, expected) <= 1
    assert distance(drawn, plain(sdxl)) > 20


def test_strength_scales_unet_and_text_encoders_and_0_is_the_base(sdxl: Sdxl, style: Path, tmp_path: Path) -> None:
    halved = {name: value * 0.5 if "lora_B" in name else value for name, value in load_file(style).items()}
    save_file(halved, tmp_path / "halved.safetensors")
    half = draw(sdxl, LoraFile(style), strength=0.5)
    assert distance(half, draw(sdxl, LoraFile(tmp_path / "halved.safetensors"))) == 0
    assert distance(half, draw(sdxl, LoraFile(style, 0.25), strength=2.0)) == 0
    assert distance(half, draw(sdxl, LoraFile(style))) > 5
    assert distance(half, plain(sdxl)) > 5
    assert distance(draw(sdxl, LoraFile(style), strength=0.0), plain(sdxl)) == 0
    assert distance(draw(sdxl, LoraFile(style), strength=0.0, merge=True), plain(sdxl)) == 0


def test_the_text_encoders_part_follows_the_strength(sdxl: Sdxl, style: Path, tmp_path: Path) -> None:
    text = {name: value for name, value in load_file(style).items() if not name.startswith("unet")}
    save_file(text, tmp_path / "text.safetensors")
    drawn = [draw(sdxl, LoraFile(tmp_path / "text.safetensors"), strength=strength) for strength in (0.0, 0.5, 1.0)]
    assert all(distance(one, other) > 0 for one, other in pairwise(drawn))


def test_merged_draws_the_same(sdxl: Sdxl, style: Path, face: Path) -> None:
    for loras in ((LoraFile(style),), (LoraFile(style, 0.5), LoraFile(face))):
        beside = draw(sdxl, *loras, strength=0.7)
        assert distance(draw(sdxl, *loras, strength=0.7, merge=True), beside) <= 1
        assert distance(beside, plain(sdxl)) > 20


def test_weights_come_back_bit_for_bit_after_an_error_while_merged(sdxl: Sdxl, style: Path) -> None:
    query = sdxl.denoiser.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight
    before = query.detach().clone()

    def interrupted() -> None:
        lora = (LoraFile(style),)
        with loras_loaded(sdxl.pipeline, lora), lora_scale(sdxl.pipeline, lora, 0.3, True):
            assert not torch.equal(query, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(query, before)  # and `sdxl_as_it_was` looks at all the others


def test_two_together_are_their_sum(sdxl: Sdxl, style: Path, face: Path, tmp_path: Path) -> None:
    one, other = load_file(style), load_file(face)
    for name, value in other.items():  # ranks side by side: the sum of both products
        one[name] = torch.cat([one[name], value * (0.5 if "lora_B" in name else 1)], dim=0 if "lora_A" in name else 1)
    # One alpha serves all of a file, so all must have one rank.
    for name, value in one.items():
        if not name.startswith("unet"):
            one[name] = torch.cat([value, torch.zeros_like(value)], dim=0 if "lora_A" in name else 1)
    save_file(one, tmp_path / "sum.safetensors")
    both = draw(sdxl, LoraFile(style), LoraFile(face, 0.5))
    assert distance(both, draw(sdxl, LoraFile(tmp_path / "sum.safetensors"))) <= 1
    assert distance(both, draw(sdxl, LoraFile(style))) > 5
    assert distance(both, draw(sdxl, LoraFile(face, 0.5))) > 5


def test_a_kohya_file_draws_the_same(sdxl: Sdxl, style: Path, tmp_path: Path) -> None:
    save_file(convert_state_dict_to_kohya(load_file(style)), tmp_path / "kohya.safetensors")
    assert any(name.startswith("lora_unet_") for name in load_file(tmp_path / "kohya.safetensors"))
    assert distance(draw(sdxl, LoraFile(tmp_path / "kohya.safetensors")), draw(sdxl, LoraFile(style))) <= 1


def test_each_layer_of_a_kohya_file_has_its_own_alpha(sdxl: Sdxl, base: Path, style: Path, tmp_path: Path) -> None:
    """diffusers would give the commonest alpha to all."""
    folded, kohya = load_file(style), convert_state_dict_to_kohya(load_file(style))
    alphas = [name for name in kohya if name.endswith(".alpha")]
    for index, name in enumerate(alphas):
        kohya[name] = torch.tensor(2.0 + 2 * (index % 3 == 0))
    by_flat_name = {name.split(".lora_B")[0].replace(".", "_"): name for name in folded if "lora_B" in name}
    for name in alphas:
        path = name.removesuffix(".alpha").replace("lora_unet_", "unet_").replace("lora_te1_", "text_encoder_")
        folded[by_flat_name[path.replace("lora_te2_", "text_encoder_2_")]] *= kohya[name] / 2
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(folded, tmp_path / "folded.safetensors")
    assert distance(draw(sdxl, LoraFile(tmp_path / "kohya.safetensors")), plain(sdxl)) > 20
    assert distance(draw(sdxl, LoraFile(tmp_path / "kohya.safetensors")), draw(sdxl, LoraFile(style))) > 5
    with loras_loaded(sdxl.pipeline, (LoraFile(tmp_path / "kohya.safetensors"),)):
        mine = deltas(sdxl.pipeline)
    expected = as_diffusers_loads(base, tmp_path / "folded.safetensors")
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, msg=name)


def test_small_factors_keep_their_update_in_half_precision(base: Path, style: Path, tmp_path: Path) -> None:
    small = {name: value * (1e-6 if "lora_B" in name else 1) for name, value in load_file(style).items()}
    save_file(small, tmp_path / "small.safetensors")
    half = load_sdxl(ModelConfig(pretrained_model_name_or_path=str(base)), torch.device("cpu"), torch.float16)
    with loras_loaded(half.pipeline, (LoraFile(tmp_path / "small.safetensors"),)):
        query = half.denoiser.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
        down, up = query.lora_A["lora_0"].weight.double(), query.lora_B["lora_0"].weight.double()
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    expected = small[f"{name}B.weight"].double() @ small[f"{name}A.weight"].double()
    assert float((up @ down - expected).detach().norm()) < 2**-9 * float(expected.norm())


def test_a_dora_in_diffusers_layout_is_that_of_a_stock_pipeline(sdxl: Sdxl, base: Path, tmp_path: Path) -> None:
    pipeline, call = stock(base)
    layers = ["to_q", "to_v", "conv1"]
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=layers))
    rng = torch.Generator().manual_seed(4)
    for name, value in pipeline.unet.named_parameters():
        if "lora_" in name:
            value.data += torch.randn(value.shape, generator=rng)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    expected = pipeline(**call).images[0]
    assert distance(draw(sdxl, LoraFile(tmp_path / FILE)), expected) <= 1
    assert distance(expected, plain(sdxl)) > 20


def test_the_doras_that_diffusers_cannot_restore_are_refused(sdxl: Sdxl, style: Path, tmp_path: Path) -> None:
    kohya = convert_state_dict_to_kohya(load_file(style))
    scales = {
        name.replace(".lora_up.weight", ".dora_scale"): torch.ones(len(value), 1)
        for name, value in kohya.items()
        if name.endswith(".lora_up.weight")
    }
    save_file(kohya | scales, tmp_path / "kohya.safetensors")
    text = {
        name.replace(".lora_B.weight", ".lora_magnitude_vector"): torch.ones(len(value))
        for name, value in load_file(style).items()
        if name.endswith(".lora_B.weight")
    }
    save_file(load_file(style) | text, tmp_path / "text.safetensors")
    for name, sentence in (("kohya", "kohya.safetensors.*DoRA"), ("text", "DoRA.*text encoder")):
        with (
            pytest.raises(ConfigError, match=sentence),
            loras_loaded(sdxl.pipeline, (LoraFile(tmp_path / f"{name}.safetensors"),)),
        ):
            pass


def test_the_new_tokens_of_a_run_belong_to_each_of_its_files(sdxl: Sdxl, face: Path, tmp_path: Path) -> None:
    rows = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)}
    save_file(rows, tmp_path / "pytorch_lora_weights_emb.safetensors")
    (tmp_path / FILE).write_bytes(face.read_bytes())
    kohya = convert_state_dict_to_kohya(load_file(face))
    save_file(kohya, tmp_path / "ti.safetensors", metadata={"modelspec.trigger_phrase": "<s0><s1>"})
    save_file(kohya, tmp_path / "other.safetensors", metadata={"modelspec.trigger_phrase": "a fox"})
    prompt = "a <s0><s1> fox"
    drawn = draw(sdxl, LoraFile(tmp_path / FILE), prompt=prompt)
    assert distance(draw(sdxl, LoraFile(tmp_path / "ti.safetensors"), prompt=prompt), drawn) <= 1
    assert distance(draw(sdxl, LoraFile(tmp_path / "other.safetensors"), prompt=prompt), drawn) > 1
    both = LoraFile(tmp_path / "ti.safetensors", 0.5), LoraFile(tmp_path / FILE, 0.5)
    assert distance(draw(sdxl, *both, prompt=prompt), drawn) <= 1


def test_new_tokens_beside_the_lora_are_those_of_a_stock_pipeline(
    sdxl: Sdxl, base: Path, face: Path, tmp_path: Path
) -> None:
    lora = tmp_path / FILE
    lora.write_bytes(face.read_bytes())
    rows = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)}
    save_file(rows, tmp_path / "run_emb.safetensors")
    prompt = "a <s0><s1> fox"
    before = torch.random.get_rng_state()
    drawn = draw(sdxl, LoraFile(lora), prompt=prompt)
    assert torch.equal(torch.random.get_rng_state(), before)
    pipeline, call = stock(base, prompt)
    pipeline.load_lora_weights(lora)
    for key, part, tokenizer in (("clip_l", "text_encoder", "tokenizer"), ("clip_g", "text_encoder_2", "tokenizer_2")):
        encoder = getattr(pipeline, part)
        pipeline.load_textual_inversion(
            rows[key], token=["<s0>", "<s1>"], text_encoder=encoder, tokenizer=getattr(pipeline, tokenizer)
        )
    assert distance(drawn, pipeline(**call).images[0]) <= 1
    assert distance(drawn, draw(sdxl, LoraFile(face), prompt=prompt)) > 0
    save_file({"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 16)}, tmp_path / "run_emb.safetensors")
    with pytest.raises(ConfigError, match=r"run_emb.safetensors has clip_g .* \(2, 16\).* \(N, 24\)"):
        draw(sdxl, LoraFile(lora))


def test_an_image_is_the_same_alone_and_among_others_and_alike_in_all_precisions(sdxl: Sdxl, base: Path) -> None:
    both = generate_images(sdxl, ["a cow", "a fox"], [3, 0], ImageSettings(32, 2), batch_size=1)
    assert distance(both[1], plain(sdxl)) == 0
    batch = generate_images(sdxl, ["a cow", "a fox", "a crown"], [3, 0, 0], ImageSettings(32, 2))
    assert distance(batch[1], plain(sdxl)) <= 1
    model = ModelConfig(pretrained_model_name_or_path=str(base))
    half = load_sdxl(model, torch.device("cpu"), torch.bfloat16)
    assert distance(plain(half), plain(sdxl)) < distance(plain(sdxl, seed=1), plain(sdxl)) / 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "remedy"), [("unet", "--learning_rate"), ("vae", "--pretrained_vae_model")])
def test_an_image_that_is_not_finite_is_black_and_told_with_its_prompt(
    sdxl: Sdxl, caplog: pytest.LogCaptureFixture, part: str, remedy: str, value: float
) -> None:
    model = sdxl.denoiser.conv_out if part == "unet" else sdxl.vae.decoder
    with model.register_forward_hook(lambda _module, _inputs, output: output * value):
        (image,) = generate_images(sdxl, ["a fox"], [0], ImageSettings(32, 2))
        assert "'a fox'" in caplog.text
        assert "float32" in caplog.text
        assert remedy in caplog.text
        assert not np.asarray(image).any()
        with pytest.raises(RunError, match=f"'a fox'.*{remedy}"):
            generate_images(sdxl, ["a fox"], [0], ImageSettings(32, 2), must_be_finite=True)


def test_a_unet_that_overflows_in_fp16_is_told_another_precision(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig(pretrained_model_name_or_path=str(base))
    sdxl = load_sdxl(config, torch.device("cpu"), torch.float16)
    sdxl.denoiser.conv_out.register_forward_hook(lambda _module, _inputs, output: output * 1e6)
    generate_images(sdxl, ["a fox"], [0], ImageSettings(32, 2))
    assert "float16: give another --mixed_precision, for class images --prior_generation_precision" in caplog.text


def test_a_negative_prompt_counts(sdxl: Sdxl) -> None:
    drawn = generate_images(sdxl, ["a fox"], [0], ImageSettings(32, 2, negative_prompt="a cow"))[0]
    assert distance(drawn, plain(sdxl)) > 0


def test_the_rescale_of_guidance_is_that_of_the_settings(base: Path, tmp_path: Path) -> None:
    drawn = []
    for rescale in (None, 0.0, 1.0):
        settings = {"prompts": ("a fox",), "guidance_rescale": rescale}
        (grid,) = generate(config(base, tmp_path / str(rescale), **settings))
        drawn.append(Image.open(next(grid.parent.glob("*_base.png"))))
    unasked, without, whole = drawn
    assert distance(unasked, without) == 0, "this base asks for none"
    assert distance(whole, without) > 0


def test_a_path_stands_for_one_lora_or_for_several(face: Path, style: Path, tmp_path: Path) -> None:
    assert parse_lora(str(face)) == parse_lora(str(face.parent)) == (LoraFile(face),)
    assert parse_lora(f"{face}@0.6+{style.parent}@-.5") == (LoraFile(face, 0.6), LoraFile(style, -0.5))
    odd = tmp_path / "a+b@2.safetensors"
    odd.write_bytes(b"")
    assert parse_lora(str(odd)) == (LoraFile(odd),)
    with pytest.raises(ConfigError, match=r"lora=.*twice"):
        parse_lora(f"{face}+{face.parent}")


def bad_files(folder: Path) -> dict[str, Path]:
    """By what the complaint must say: LoRA files that cannot be used with the random base."""
    pair = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}
    query = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q."
    contents = {
        "text.safetensors": {"weight": torch.ones(2)},
        "elsewhere.safetensors": {f"unet.nowhere.{name}": value for name, value in pair.items()},
        "other_size.safetensors": {query + name: value for name, value in pair.items()},
    }
    for name, tensors in contents.items():
        save_file(tensors, folder / name)
    (folder / "garbage.safetensors").write_bytes(b"\x00" * 100)
    (folder / "pickle.bin").write_bytes(b"\x00")
    (folder / "empty").mkdir()
    return {path.name: path for path in [*folder.iterdir(), folder / "missing.safetensors"]}


def test_a_lora_that_cannot_be_used_is_one_sentence_and_exit_code_2(
    base: Path, face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "files").mkdir()
    out = tmp_path / "out"
    for name, path in bad_files(tmp_path / "files").items():
        flags = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(out), "--prompts", "a fox"]
        assert main(["generate", *flags, "--lora", str(face), str(path)]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert name in errors[0]
    assert not out.exists(), "something was drawn before the complaint"


def test_layers_that_are_left_out_are_counted(
    sdxl: Sdxl, face: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = sum("lora_A" in name for name in load_file(face))
    more = {
        **load_file(face),
        "unet.nowhere.lora_A.weight": torch.ones(2, 8),
        "unet.nowhere.lora_B.weight": torch.ones(8, 2),
    }
    save_file(more, tmp_path / "more.safetensors")
    draw(sdxl, LoraFile(tmp_path / "more.safetensors"))
    assert f"more.safetensors: only {layers} of its {layers + 1} layers are in this base" in caplog.text


def test_a_run_leaves_a_grid_and_files_that_say_how_they_were_made(
    base: Path, style: Path, face: Path, tmp_path: Path
) -> None:
    settings = {
        "prompts": ('a "fox": red, big',),
        "seeds": (0, 7),
        "negative_prompt": "fog (grey)",
        "lora": (str(style.parent), f"{style}+{face}@0.5"),
        "strengths": (0.8,),
    }
    grids = generate(config(base, tmp_path / "out", **settings))
    folder = tmp_path / "out" / "001"
    assert grids == [folder / "grid.png"]
    prefix = "01_a-fox-red-big_seed"
    rows = ("00_base", "01_style_0.8", "02_style-+-face-0.5_0.8")
    names = {f"{prefix}-{seed}_{row}.png" for seed in (0, 7) for row in rows}
    assert {path.name for path in folder.iterdir()} == names | {"grid.png"}
    text = Image.open(folder / f"{prefix}-7_02_style-+-face-0.5_0.8.png").text  # type: ignore[attr-defined]
    first, negative, last = text["parameters"].split("\n")
    assert first == 'a "fox": red, big <lora:style:0.8> <lora:face:0.4>'
    assert negative == r"Negative prompt: fog \(grey\)"
    # The pattern by which A1111 takes the line apart.
    values = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    expected = {"Steps": "1", "Sampler": "Euler", "CFG scale": "5.0", "Seed": "7", "Size": "32x32", "Model": base.name}
    expected["RNG"] = "CPU"
    assert expected.items() <= values.items()
    assert {"prompt", "workflow"} <= text.keys(), "ComfyUI finds nothing in it"
    actual = json.loads(text["flatlora_diffusion"])
    assert (actual["prompt"], actual["seed"], actual["mixed_precision"], actual["merge"]) == (
        'a "fox": red, big',
        7,
        "no",
        False,
    )
    assert [(lora["name"], lora["strength"]) for lora in actual["lora"]] == [("style", 0.8), ("face", 0.4)]
    assert actual["pretrained_model_name_or_path"] == base.name
    for path in folder.iterdir():
        said = str(Image.open(path).info)
        assert str(tmp_path) not in said
        assert str(base.parent) not in said


def test_nothing_is_overwritten(base: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        generate(config(base, tmp_path / "out", prompts=("a fox",), seeds=(number,)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["001", "002"]
    assert [path.name for path in sorted((tmp_path / "out" / "001").iterdir())] == [
        "01_a-fox_seed-1_00_base.png",
        "grid.png",
    ]
    assert (tmp_path / "out" / "002" / "01_a-fox_seed-2_00_base.png").exists()


def test_too_many_columns_give_several_grids(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa cow\n\n a crown \n", encoding="utf-8")
    grids = generate(config(base, tmp_path, prompts=("a fox",), prompts_file=str(file), seeds=(0, 1, 2), batch_size=4))
    assert [grid.name for grid in grids] == ["grid_01.png", "grid_02.png"]
    texts = [json.loads(Image.open(grid).text["flatlora_diffusion"]) for grid in grids]  # type: ignore[attr-defined]
    assert [text["prompts"] for text in texts] == [["a fox", "a cow"], ["a crown"]]
    singles = sorted(path.name for path in grids[0].parent.glob("0*.png"))
    assert singles[:3] == [f"01_a-fox_seed-{seed}_00_base.png" for seed in (0, 1, 2)]
    cells = [np.asarray(Image.open(grids[0]))[60:220, 150 + 200 * column : 342 + 200 * column] for column in range(6)]
    assert len({cell.tobytes() for cell in cells}) == 6


def test_names_tell_loras_apart_and_files_are_safe_everywhere(
    base: Path, face: Path, style: Path, tmp_path: Path
) -> None:
    for run in ("one/lora", "two/lora"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / FILE).write_bytes(face.read_bytes())
    (tmp_path / "two" / "lora.safetensors").write_bytes(style.read_bytes())
    loras = tuple(str(tmp_path / path) for path in ("one/lora", "two/lora", "two/lora.safetensors"))
    generate(config(base, tmp_path / "out", prompts=('CON: <x> "?*|\\ ' + "y" * 200 + ". ",), lora=loras))
    names = sorted(path.name for path in (tmp_path / "out" / "001").iterdir())
    assert len(names) == 5
    assert all(re.fullmatch(r"[\w.+-]{1,150}\.png", name) for name in names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": "a fox"}, "prompts='a fox' must be a tuple"),
        ({"seeds": (1, 1)}, "seeds has 1 twice"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (-1,)}, "seeds=-1 is out of range"),
        ({"strengths": (float("nan"),)}, "strengths=nan must be a finite number"),
        ({"negative_prompt": "fog", "guidance_scale": 1.0}, "negative_prompt has no effect at guidance_scale=1"),
        ({"merge": True, "model": ModelConfig(quantize_base="nf4")}, "--merge .*--quantize_base"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**settings)


def test_wrong_input_is_named_before_anything_is_drawn(base: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({}, "--prompts"),
        ({"prompts_file": str(tmp_path / "none.txt")}, "none.txt' cannot be read"),
        ({"prompts": ("a fox",), "resolution": 33}, "resolution=33 must be a multiple of 16 for this base; 32 is"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(config(base, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_named_before_the_base_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir='.*out' cannot be written: .+; give another folder"):
        generate(config(tmp_path / "no-base", tmp_path / "file" / "out", prompts=("a fox",)))


def test_long_labels_stay_in_their_place() -> None:
    font = ImageFont.load_default(16)
    text = wrapped("two words and one_that_is_much_longer_than_a_line_can_be", font, 90)
    assert text.replace("\n", "").replace(" ", "") == "twowordsandone_that_is_much_longer_than_a_line_can_be"
    assert all(font.getlength(line) <= 90 for line in text.split("\n"))
    assert wrapped("word " * 500, font, 90).count("\n") == 7
    red = Image.new("RGB", (8, 8), "red")
    names = ["Base", "a-lora_with_a_name_without_end_and_without_spaces x 0.8"]
    grid = labelled_grid([[red, red], [red, red]], names, ["long " * 40, "a fox"], 192, "caption " * 60)
    pixels = np.asarray(grid)
    reds = (pixels == (255, 0, 0)).all(axis=2)
    assert reds.sum() == 4 * 192 * 192, "a label runs into an image"
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 255).all() for edge in edges), "a label runs off the picture"


def test_the_row_of_the_base_needs_no_lora() -> None:
    assert (LoraRow(0).label, LoraRow(0).slug) == ("Base", "00_base")


def test_the_command_line_draws_a_grid(
    base: Path, face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--pretrained_model_name_or_path", str(base)]
    command += ["--prompts", "a fox", "a cow", "--seeds", "3", "--lora", str(face), "--strengths", "-1", "0.5"]
    command += ["--num_inference_steps", "1", "--output_dir", str(tmp_path), "--merge"]
    assert main(command) == 0
    assert str(tmp_path / "001" / "grid.png") in capsys.readouterr().out
    assert len(list((tmp_path / "001").glob("0[12]_a-*_seed-3_0[0-2]_*.png"))) == 6


def test_a_run_is_drawn_with_the_base_it_was_trained_on(
    lora: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual default is another base, which its LoRA does not fit."""
    run = tmp_path / "run"
    shutil.copytree(lora.parent, run)
    saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert saved["pretrained_model_name_or_path"] == f".../{base.name}", "no absolute path is saved"
    (run / "config.json").write_text(json.dumps(saved | {"pretrained_model_name_or_path": str(base)}))
    flags = ["--prompts", "a fox", "--num_inference_steps", "1", "--output_dir", str(tmp_path / "out")]
    assert main(["generate", *flags, "--lora", str(run)]) == 0
    with Image.open(tmp_path / "out" / "001" / "01_a-fox_seed-0_00_base.png") as drawn:
        assert drawn.size == (32, 32)
    assert main(["generate", *flags, "--lora", str(run), "--pretrained_model_name_or_path", "tiny"]) == 2
    assert "its layers have other sizes; give the base it was made for" in capsys.readouterr().err


def test_runs_of_two_bases_ask_for_one(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        shutil.copytree(lora.parent, tmp_path / name)
        saved = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        (tmp_path / name / "config.json").write_text(json.dumps(saved | {"pretrained_model_name_or_path": name}))
    runs = [str(tmp_path / name) for name in ("one", "two")]
    assert main(["generate", "--prompts", "a fox", "--lora", *runs]) == 2
    assert "different bases (one, two): choose a base with --pretrained_model_name_or_path" in capsys.readouterr().err


def test_a_base_that_is_saved_as_below_the_home_is_found_again(
    lora: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    monkeypatch.setenv("USERPROFILE", str(base.parent))
    run = Path(shutil.copytree(lora.parent, tmp_path / "run"))
    saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps(saved | {"pretrained_model_name_or_path": f"~/{base.name}"}))
    flags = ["--prompts", "a fox", "--num_inference_steps", "1", "--output_dir", str(tmp_path / "out")]
    assert main(["generate", *flags, "--lora", str(run)]) == 0
