"""`merge`: the saved model has PEFT's merged weights, loads as a base, and generates the images of the LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lora_layouts import ALPHAS, adapted, factors, kohya, peft, saved
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.families.sdxl.loading import load_pipeline

PARTS = ("unet", "text_encoder", "text_encoder_2", "vae")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of attention, convolutions and text encoders in kohya's layout, with a clear effect."""
    return saved(kohya(factors(adapted(base))), tmp_path_factory.mktemp("lora") / "fox.safetensors")


@pytest.fixture(scope="module")
def second(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = factors(adapted(base, ("to_q", "to_v"), ()))
    return saved(peft(whole, ALPHAS), tmp_path_factory.mktemp("lora") / "owl.safetensors")


def load(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = ModelConfig(pretrained_model_name_or_path=str(path), **settings)
    return load_pipeline(config, torch.device("cpu"), dtype)


def with_loras(base: Path, *files: tuple[Path, float]) -> Any:
    """The base with diffusers' own LoRAs at these strengths beside its weights."""
    pipeline = load(base)
    for index, (file, _) in enumerate(files):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{index}")
    pipeline.set_adapters([f"a{index}" for index in range(len(files))], [strength for _, strength in files])
    return pipeline


def weights(pipeline: Any) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for part in PARTS for name, value in getattr(pipeline, part).state_dict().items()}


def fused(pipeline: Any) -> dict[str, Tensor]:
    pipeline.fuse_lora(adapter_names=pipeline.get_active_adapters())
    pipeline.unload_lora_weights()
    return weights(pipeline)


def image(pipeline: Any) -> np.ndarray[Any, Any]:
    rng = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "generator": rng}
    drawn: np.ndarray[Any, Any] = pipeline("a fox", height=32, width=32, **options).images[0]
    return drawn


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=tolerance, atol=tolerance, msg=name)


def test_a_merged_folder_has_the_fused_weights_and_generates_the_same_image(
    base: Path, lora: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    assert main(["merge", "--base", str(base), "--lora", f"{lora}@0.7", "--output", str(output)]) == 0
    beside = with_loras(base, (lora, 0.7))
    merged, drawn = load(output), image(beside)
    np.testing.assert_allclose(image(merged), drawn, atol=1e-4)
    assert np.abs(drawn - image(load(base))).mean() > 0.01
    assert_close(weights(merged), fused(beside))
    assert_close(weights(StableDiffusionXLPipeline.from_pretrained(output)), weights(merged))


def test_a_merged_single_file_opens_as_a_base(base: Path, lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged.safetensors"
    arguments = ["merge", "--base", str(base), "--lora", str(lora), "--output", str(output), "--single_file"]
    assert main(arguments) == 0
    merged = load(output, single_file_config=str(base))
    assert_close(weights(merged), fused(with_loras(base, (lora, 1.0))))
    names = load_file(output).keys()
    assert "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight" in names
    assert "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight" in names
    again = tmp_path / "again.safetensors"
    more = ["--single_file_config", str(base), "--lora", f"{lora}@-1"]
    assert main(["merge", "--base", str(output), *more, "--output", str(again), "--single_file"]) == 0
    assert_close(weights(load(again, single_file_config=str(base))), weights(load(base)))


def test_several_loras_add_up(base: Path, lora: Path, second: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    files = [f"{lora}@0.5", f"{second}@-1.25"]
    assert main(["merge", "--base", str(base), "--lora", *files, "--output", str(output)]) == 0
    assert_close(weights(load(output)), fused(with_loras(base, (lora, 0.5), (second, -1.25))))


def test_sums_are_formed_in_fp32_and_saved_in_the_bases_dtype(
    base: Path, lora: Path, second: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    pipeline = load(base)
    pipeline.unet.half()
    pipeline.save_pretrained(half)
    output = tmp_path / "merged"
    files = [str(lora), str(second)]
    assert main(["merge", "--base", str(half), "--lora", *files, "--output", str(output)]) == 0
    saved_unet = load_file(output / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved_unet.values()} == {torch.float16}
    vae = load_file(output / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in vae.values()} == {torch.float32}
    exact = fused(with_loras(half, (lora, 1.0), (second, 1.0)))
    for name, value in saved_unet.items():
        assert torch.equal(value, exact[f"unet.{name}"].half()) or torch.allclose(
            value.float(), exact[f"unet.{name}"], rtol=2**-10, atol=1e-6
        ), name


def error_message(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    assert main(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_wrong_input_is_an_error_of_one_sentence(
    capsys: pytest.CaptureFixture[str], base: Path, lora: Path, tmp_path: Path
) -> None:
    start = ["merge", "--base", str(base), "--lora", str(lora), "--output"]
    assert "--lora is missing" in error_message(capsys, ["merge", "--base", str(base), "--output", "x"])
    assert "must be a .safetensors file" in error_message(capsys, [*start, str(tmp_path / "x"), "--single_file"])
    assert "must be a folder" in error_message(capsys, [*start, str(tmp_path / "x.safetensors")])
    assert "already exists" in error_message(capsys, [*start, str(tmp_path)])
    assert "without a model" in error_message(capsys, [*start, str(tmp_path), "--overwrite"])
    assert "is an input" in error_message(capsys, [*start, str(base), "--overwrite"])
    assert "neither a LoRA file" in error_message(capsys, [*start[:4], "nowhere", "--output", str(tmp_path / "x")])
    hub = ["merge", "--base", "someone/no-such-base", *start[3:], str(tmp_path / "x")]
    assert "error: base='someone/no-such-base'" in error_message(capsys, hub)
    (tmp_path / "base.safetensors").write_bytes(b"broken")
    for bad, sentence in ((tmp_path / "base.safetensors", "is damaged"), (tmp_path / "nowhere", "does not exist")):
        arguments = ["merge", "--base", str(bad), "--lora", str(lora), "--output", str(tmp_path / "x")]
        assert sentence in error_message(capsys, arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_an_unwritable_output_is_an_error_of_one_sentence(
    capsys: pytest.CaptureFixture[str], base: Path, lora: Path, tmp_path: Path
) -> None:
    start = ["merge", "--base", str(base), "--lora", str(lora), "--output"]
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "folder.safetensors").mkdir()
    for more in ([], ["--overwrite"]):
        assert (
            error_message(capsys, [*start, str(file), *more]) == f"error: {file} is a file; give a folder as --output"
        )
        single = [*start, str(tmp_path / "folder.safetensors"), "--single_file", *more]
        assert "is a folder; give a .safetensors file as --output" in error_message(capsys, single)
    for bad in (file / "merged", Path("/proc/merged")):
        assert f"{bad} cannot be written: " in error_message(capsys, [*start, str(bad)])
    assert "cannot be written: " in error_message(capsys, [*start, "/proc/merged.safetensors", "--single_file"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_an_overflow_stops_the_merge(
    capsys: pytest.CaptureFixture[str], base: Path, lora: Path, tmp_path: Path
) -> None:
    huge = {name: value * (1e6 if "lora_up" in name else 1) for name, value in load_file(lora).items()}
    save_file(huge, tmp_path / "huge.safetensors")
    arguments = ["merge", "--base", str(base), "--lora", str(tmp_path / "huge.safetensors"), "--dtype", "fp16"]
    output = tmp_path / "x"
    assert "overflows torch.float16" in error_message(capsys, [*arguments, "--output", str(output)], code=1)
    assert not output.exists()


def test_new_tokens_that_are_not_merged_are_a_warning(
    base: Path, lora: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(load_file(lora), tmp_path / "ti.safetensors", metadata={"modelspec.trigger_phrase": "<s0><s1>"})
    save_file({"clip_l": torch.ones(2, 16)}, tmp_path / "pytorch_lora_weights_emb.safetensors")
    start = ["merge", "--base", str(base), "--lora"]
    assert main([*start, str(lora), "--output", str(tmp_path / "plain")]) == 0
    assert "new tokens" not in caplog.text
    assert main([*start, str(tmp_path / "ti.safetensors"), "--output", str(tmp_path / "merged")]) == 0
    assert "ti.safetensors has embeddings of new tokens" in caplog.text
