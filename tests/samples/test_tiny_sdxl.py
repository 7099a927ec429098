"""The shipped tiny base: it loads as SDXL, is whole and small, draws what it is asked for, and can be trained."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file

from flatlora_diffusion.compare.losses import UNGROUPED, ImageSet, LossEvaluator
from flatlora_diffusion.config import SAMPLES, ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import load_samples, metadata_rows
from flatlora_diffusion.evaluation.judge import load_judge, rank_names, rank_of
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss
from flatlora_diffusion.families.sdxl.objective import SdxlObjective
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.training.trainer import train
from samples.tiny_sdxl.recipe.icons import load_3d
from samples.tiny_sdxl.recipe.quality import PROMPT, quality_table
from samples.tiny_sdxl.recipe.vae import psnr

TINY = SAMPLES / "tiny_sdxl"
TRAINING, HELD_OUT = SAMPLES / "icons_3d", SAMPLES / "icons_3d" / "heldout"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    """The base as anyone loads it, with nothing of ours."""
    found = StableDiffusionXLPipeline.from_pretrained(TINY, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def tiny() -> Sdxl:
    """The base as the trainer loads it."""
    config = ModelConfig(pretrained_model_name_or_path="tiny")
    return load_sdxl(config, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def own() -> list[str]:
    """The captions of the 33 icons in the base's own styles."""
    return [sample.caption for sample in load_samples(SAMPLES / "icons_flat").samples]


def loss_with(tiny: Sdxl, captions: list[str]) -> float:
    """The base's denoising loss on those icons, two draws each, if these were their captions."""
    samples = load_samples(SAMPLES / "icons_flat").samples
    asked = [replace(sample, caption=text) for sample, text in zip(samples, captions, strict=True)]
    return probe_loss(tiny.denoiser, SdxlObjective(tiny.scheduler), fixed_probe(tiny, asked, 64, seed=0, draws=2))


@pytest.fixture(scope="module")
def own_loss(tiny: Sdxl, own: list[str]) -> float:
    return loss_with(tiny, own)


def test_it_is_built_like_sdxl(pipeline: StableDiffusionXLPipeline) -> None:
    unet, vae = pipeline.unet.config, pipeline.vae.config
    assert list(unet.down_block_types) == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert list(unet.up_block_types) == ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    assert unet.addition_embed_type == "text_time"
    assert unet.use_linear_projection
    assert unet.layers_per_block == 2
    assert unet.in_channels == unet.out_channels == vae.latent_channels == 4
    assert len(vae.latents_mean) == len(vae.latents_std) == 4
    widths = [encoder.config.hidden_size for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    assert widths == [96, 128]
    assert unet.cross_attention_dim == sum(widths)
    assert pipeline.config.force_zeros_for_empty_prompt


def test_its_scheduler_has_sdxls_noise(pipeline: StableDiffusionXLPipeline) -> None:
    scheduler = pipeline.scheduler
    assert type(scheduler) is EulerDiscreteScheduler
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(scheduler.betas, betas)
    assert scheduler.config.prediction_type == "epsilon"


def test_all_weights_are_finite_and_in_fp16() -> None:
    files = sorted(TINY.rglob("*.safetensors"))
    parts = {file.parent.name for file in files}
    assert parts == {"judge", "text_encoder", "text_encoder_2", "unet", "vae"}
    for file in files:
        for name, weight in load_file(file).items():
            assert weight.dtype == torch.float16, f"{file.parent.name}: {name}"
            assert weight.isfinite().all(), f"{file.parent.name}: {name}"


def test_base_and_judge_are_small() -> None:
    judge = sum(file.stat().st_size for file in (TINY / "judge").rglob("*"))
    everything = sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file())
    assert judge <= 8e6
    assert everything - judge <= 40e6


def test_no_json_file_names_a_folder_of_the_machine_it_was_made_on() -> None:
    absolute = re.compile(r'"(/|~|[A-Za-z]:)[\\/]*\w[^"]*[\\/][^"]*"')
    assert absolute.search('"/home/me"')
    assert absolute.search(r'"C:\\me\\base"')
    for file in TINY.rglob("*.json"):
        found = absolute.search(file.read_text(encoding="utf-8"))
        assert found is None, f"{file.relative_to(TINY)} has {found}"


@pytest.mark.parametrize("folder", [TRAINING, HELD_OUT], ids=["training", "heldout"])
def test_the_vae_reconstructs_3d_icons(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """It measured 33.3 dB on the training icons and 31.4 dB on the held-out ones."""
    images = np.stack([load_3d(file) for file in sorted(folder.glob("*.png"))])
    assert psnr(pipeline.vae, images) >= 29


@pytest.mark.long
def test_the_judge_finds_the_right_name_for_most_of_what_it_draws(pipeline: StableDiffusionXLPipeline) -> None:
    """Every fifth held-out name, among all 64: it measured 11 of 13; chance finds 0.2, and 8 are asked for."""
    names = [row["name"] for row in metadata_rows(HELD_OUT).values()]
    drawn = names[::5]
    icons = pipeline(
        prompt=[PROMPT.format(name) for name in drawn],
        height=64,
        width=64,
        num_inference_steps=25,
        guidance_scale=5.0,
        generator=[generator("cpu", 0, "quality", name) for name in drawn],
    ).images
    ranks = rank_of(rank_names(load_judge(TINY / "judge"), icons, names), torch.arange(0, len(names), 5))
    assert len(drawn) == 13
    assert int((ranks == 0).sum()) >= 8


def test_its_loss_is_that_of_the_weights_that_were_published(own_loss: float) -> None:
    """One spoiled tensor of the UNet or a text encoder mostly shows here. A new base has a new number."""
    assert own_loss == pytest.approx(0.070438, rel=5e-5)


@pytest.mark.long
def test_an_unseen_trigger_does_much_less_harm_than_a_wrong_caption(
    tiny: Sdxl, own: list[str], own_loss: float
) -> None:
    """The loss measured +0.12 % and +0.6 % with triggers, +84 % with the captions of other icons."""
    assert loss_with(tiny, own[1:] + own[:1]) > 1.5 * own_loss
    behind = [f"{text}, in the style of TOK" for text in own]
    assert loss_with(tiny, behind) < 1.005 * own_loss
    assert loss_with(tiny, [text.replace("a flat icon", "a TOK icon") for text in behind]) < 1.015 * own_loss


@pytest.mark.long
def test_training_on_3d_icons_makes_held_out_ones_more_likely(tiny: Sdxl, tmp_path: Path) -> None:
    """After 40 steps 1 % less than the base's is asked for; that of 2026-11-24 gave 2.2 to 2.6 % with four seeds."""
    lora = train(
        TrainConfig.from_dict(
            {
                "pretrained_model_name_or_path": "tiny",
                "instance_data_dir": str(TRAINING),
                "output_dir": str(tmp_path / "run"),
                "method": "lora",
                "rank": 8,
                "max_train_steps": 40,
                "learning_rate": 1e-3,
                "train_batch_size": 4,
                "resolution": 64,
                "cache_latents": True,
                "seed": 0,
                "report_to": "none",
            }
        )
    )
    samples = load_samples(HELD_OUT).samples
    sets = {"heldout": ImageSet(samples, [UNGROUPED] * len(samples))}
    evaluator = LossEvaluator(tiny, SdxlObjective(tiny.scheduler), sets, 64, tmp_path / "kept")
    base, trained = (evaluator.losses(file)["heldout"][UNGROUPED] for file in (None, lora))
    assert trained < 0.99 * base


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TINY / "quality.json").read_text(encoding="utf-8"))
    return found


def test_the_readmes_figures_are_those_of_the_report(report: dict[str, Any]) -> None:
    readme = (TINY / "README.md").read_text(encoding="utf-8")
    assert quality_table(report) in readme
    prose = " ".join(readme.split())  # a claim may span two lines
    judges = [report["names"][name] for name in ("judge", "second_judge")]
    drawn, real, held = ([f"{value:.1%}" for value in values] for values in zip(*map(_rates, judges), strict=True))
    assert f"for {drawn[0]} of what the base draws, and for {real[0]} of real flat renders" in prose
    assert f"a second judge, another network, finds {drawn[1]} and {real[1]}" in prose
    assert f"that they never saw, of all things and styles, they find {held[0]} and {held[1]}" in prose


def _rates(names: dict[str, Any]) -> tuple[float, float, float]:
    return names["known"], names["real_known"]["flat"], names["held_out"]
