"""Whole runs on FLUX.2 klein: bit-equal where promised, and a file that stock diffusers loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import normal
from tiny_random_klein import RESOLUTION, TOKENS
from torch import Tensor

from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import AdapterConfig, ConfigError, ModelConfig, TrainConfig
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.klein.pipeline import load_klein
from flatlora_diffusion.families.objective import diffusion_loss
from flatlora_diffusion.lora_files.loading import loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training.trainer import train

CPU = torch.device("cpu")


def trained(settings: dict[str, Any], name: str, **more: Any) -> dict[str, Tensor]:
    """The LoRA of a run in a folder of its own."""
    output = str(Path(settings["output_dir"]).with_name(name))
    path: Path = train(TrainConfig.from_dict({**settings, "output_dir": output, **more}))
    return load_file(path)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_sigma_0_and_checkpointing_train_plain_lora_bit_for_bit(settings: dict[str, Any]) -> None:
    plain = trained(settings, "plain")
    assert len(plain) == 2 * 12
    assert all(value.any() for value in plain.values())
    assert same(plain, trained(settings, "zero", method="flat-lora", sigma=0.0))
    assert same(plain, trained(settings, "checkpointing", gradient_checkpointing=True))
    assert not same(plain, trained(settings, "flat", method="flat-lora", sigma=0.1, sigma_schedule="constant"))
    assert not same(plain, trained(settings, "middle", weighting_scheme="logit_normal", logit_std=0.1))


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(settings: dict[str, Any]) -> None:
    flat = {"method": "flat-lora", "sigma": 0.1, "sigma_schedule": "constant", "max_train_steps": 4}
    whole = trained(settings, "whole", **flat)
    trained(settings, "resumed", **flat | {"max_train_steps": 2, "checkpointing_steps": 2})
    resumed = trained(settings, "resumed", **flat | {"checkpointing_steps": 2, "resume_from_checkpoint": "latest"})
    assert same(whole, resumed)


def test_a_run_is_not_resumed_on_another_family(settings: dict[str, Any], base: Path) -> None:
    settings |= {"checkpointing_steps": 1, "max_train_steps": 1}
    trained(settings, "run", **settings)
    other = {"resume_from_checkpoint": "latest", "pretrained_model_name_or_path": str(base)}
    with pytest.raises(ConfigError, match="checkpoint-1 was made on another base than pretrained_model_name_or_path="):
        trained(settings, "run", **other)


def test_w_is_bit_equal_after_a_perturbed_step(klein: Path) -> None:
    base = load_klein(ModelConfig(str(klein)), CPU, torch.float32)
    before = copy.deepcopy(base.denoiser.state_dict())
    add_lora(base.denoiser, AdapterConfig(rank=2), seed=0)
    flat = FlatLora(base.denoiser, sigma=0.2, schedule="constant", seed=1, draw="full")
    batch = Batch(normal(1, 2, 16, 4, 4), base.encode_prompts(["a cup", "a tree"]), {})
    noise, levels = base.objective().draw(batch.latents, torch.Generator().manual_seed(3))
    plain = diffusion_loss(base.denoiser, base.objective(), batch, noise, levels)
    with flat.perturb(step=0):
        loss = diffusion_loss(base.denoiser, base.objective(), batch, noise, levels)
        loss.backward()
    assert not torch.equal(loss, plain)
    after = {name.replace(".base_layer", ""): value for name, value in base.denoiser.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert torch.equal(diffusion_loss(base.denoiser, base.objective(), batch, noise, levels), plain)


def test_both_files_are_one_layout_that_stock_diffusers_loads_and_that_draws_the_same(
    settings: dict[str, Any], klein: Path
) -> None:
    trained(settings, "run", lora_alpha=12.0, output_name="mine")
    run = Path(settings["output_dir"])
    files = [run / LORA_FILE, run / "mine.safetensors"]
    first, second = map(load_file, files)
    assert same(first, second)
    assert all(key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in first)
    with safe_open(files[0], framework="pt") as opened:
        adapter = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert adapter["transformer.r"] == adapter["transformer.lora_alpha"] == 4
    with safe_open(files[1], framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_base_model_version"] == "flux_2_klein_4b"
    assert not {"ss_v_parameterization", "ss_clip_skip", "modelspec.prediction_type"} & set(metadata)

    base = load_klein(ModelConfig(str(klein)), CPU, torch.float32)
    asked = ["a cup"], [1], ImageSettings(RESOLUTION, steps=2, guidance=1.0)
    without = base.decode(base.sample_latents(*asked))
    with loras_loaded(base.pipeline, [LoraFile(files[0])]):
        ours = base.decode(base.sample_latents(*asked))
    assert torch.equal(base.decode(base.sample_latents(*asked)), without)
    assert not torch.allclose(ours, without)
    for file in files:
        stock = Flux2KleinPipeline.from_pretrained(klein)
        stock.load_lora_weights(file.parent, weight_name=file.name)
        stock.set_progress_bar_config(disable=True)
        image = stock(
            prompt="a cup",
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(1),
            max_sequence_length=TOKENS,
            output_type="pt",
        ).images
        torch.testing.assert_close(stock.image_processor.postprocess(ours, output_type="pt"), image)


@pytest.mark.parametrize(
    "more",
    [
        {"holdout_images": 1, "checkpointing_steps": 1, "image_loss_draws": 2},
        {"prior_from_base": True, "class_prompt": "icon", "alpha_mask_loss": True, "caption_dropout": 0.5},
        pytest.param(
            {"with_prior_preservation": True, "class_prompt": "icon", "num_class_images": 2, "random_flip": True},
            marks=pytest.mark.long,
        ),
        {"validation_prompt": "a cup", "num_validation_images": 1, "use_aspect_ratio_buckets": True},
        {"method": "sam", "rho": 0.05, "mixed_precision": "bf16", "offload": True, "cache_latents": True},
        {"use_dora": True, "method": "flat-lora", "sigma": 0.05, "lora_target_modules": "attn+ff"},
        {"lora_target_modules": "conv", "caption_dropout": 0.1, "random_flip": True},  # as --preset demo
        {"adapter": "pissa", "loss_type": "huber", "min_timestep": 100, "weighting_scheme": "cosmap"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_options_of_a_run_work_on_klein(more: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    if "class_prompt" in more and "num_class_images" in more:
        more = {**more, "class_data_dir": str(tmp_path / "class")}
        (tmp_path / "class").mkdir()
        for index in range(2):
            Image.new("RGB", (40, 40), (90 * index, 20, 200)).save(tmp_path / "class" / f"{index}.png")
    assert all(value.isfinite().all() for value in trained(settings, "run", **more).values())
    run = RunDir(Path(settings["output_dir"]))
    if "holdout_images" in more:
        assert len(run.holdout_losses()) == 3
    if "validation_prompt" in more:
        assert list(run.folder.rglob("step-*.png"))


def test_commands_train_generate_and_inspect(
    settings: dict[str, Any], klein: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    flags = [f"--{name}={value}" for name, value in settings.items() if name != "selfcheck"]
    assert main(["train", *flags]) == 0
    run = settings["output_dir"]
    drawing = [
        "--prompts",
        "a cup",
        "a cup " * TOKENS,
        "--num_inference_steps",
        "1",
        "--output_dir",
        str(tmp_path / "images"),
    ]
    assert main(["generate", "--pretrained_model_name_or_path", str(klein), "--lora", run, *drawing]) == 0
    assert caplog.text.count(f"more than {TOKENS} tokens: the text after them is ignored") == 1
    assert (tmp_path / "images" / "001" / "grid.png").is_file()
    capsys.readouterr()
    assert main(["inspect", f"{run}/{LORA_FILE}", "--base", str(klein)]) == 0
    text = capsys.readouterr().out
    assert "transformer.single_transformer_blocks.1" in text
    assert "diffusers             12 of 12" in text
