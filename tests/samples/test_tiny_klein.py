"""The tiny klein base: it loads as FLUX.2 klein, is whole and small, and draws what it is asked for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file

from flatlora_diffusion.config import SAMPLES
from samples.tiny_klein.recipe.training import TOKENS
from samples.tiny_sdxl.recipe.quality import quality_table

TINY = SAMPLES / "tiny_klein"


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    """The base as anyone loads it, with nothing of ours."""
    found = Flux2KleinPipeline.from_pretrained(TINY, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipeline: Flux2KleinPipeline, prompts: list[str], **asked: Any) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    images: list[Image.Image] = pipeline(
        prompt=prompts, height=64, width=64, generator=generators, **{"max_sequence_length": TOKENS, **asked}
    ).images
    return images


def test_it_is_built_like_klein(pipeline: Flux2KleinPipeline) -> None:
    assert not pipeline.config.is_distilled
    transformer, text, vae = pipeline.transformer.config, pipeline.text_encoder.config, pipeline.vae.config
    assert not transformer.guidance_embeds
    assert transformer.num_layers >= 2
    assert transformer.num_single_layers >= 2 * transformer.num_layers
    assert sum(transformer.axes_dims_rope) == transformer.attention_head_dim
    assert transformer.in_channels == 4 * vae.latent_channels == len(pipeline.vae.bn.running_mean)
    assert transformer.joint_attention_dim == 3 * text.hidden_size
    assert text.model_type == "qwen3"
    assert text.num_hidden_layers > 27, "the last state that klein reads comes before the final norm"
    assert text.vocab_size == len(pipeline.tokenizer)


def test_its_scheduler_and_template_are_those_of_klein(pipeline: Flux2KleinPipeline) -> None:
    scheduler = pipeline.scheduler
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert scheduler.config.use_dynamic_shifting
    assert scheduler.config.time_shift_type == "exponential"
    message = [{"role": "user", "content": "a fox"}]
    asked = {"tokenize": False, "add_generation_prompt": True}
    turn = "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"
    assert pipeline.tokenizer.apply_chat_template(message, **asked) == turn
    quick = pipeline.tokenizer.apply_chat_template(message, enable_thinking=False, **asked)
    assert quick == f"{turn}<think>\n\n</think>\n\n"


def test_all_weights_are_finite_and_in_bf16() -> None:
    files = sorted(TINY.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"text_encoder", "transformer", "vae"}
    for file in files:
        for name, weight in load_file(file).items():
            assert weight.isfinite().all(), f"{file.parent.name}: {name}"
            is_count = name == "bn.num_batches_tracked"
            assert weight.dtype == (torch.int64 if is_count else torch.bfloat16), f"{file.parent.name}: {name}"


def test_it_is_small() -> None:
    assert (TINY / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size <= 20e6
    assert sum(file.stat().st_size for file in TINY.rglob("*.safetensors")) <= 30e6


def test_no_json_file_names_a_folder_of_the_machine_it_was_made_on() -> None:
    for file in TINY.rglob("*.json"):
        if file.name != "tokenizer.json":  # its tokens and merges have slashes of their own
            assert not [text for text in _strings(json.loads(file.read_text(encoding="utf-8"))) if text[:1] in "/~"]


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) and value else []


def test_the_batch_statistics_are_those_of_its_icons(pipeline: Flux2KleinPipeline) -> None:
    """Icons of the base's own styles come out with about mean 0 and standard deviation 1 in every channel."""
    files = sorted((SAMPLES / "icons_flat").glob("*.png"))
    pixels = torch.stack([pipeline.image_processor.preprocess(Image.open(file).convert("RGB"))[0] for file in files])
    with torch.no_grad():
        latents = pipeline._encode_vae_image(pixels, None)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.3
    assert ((latents.std(dim=(0, 2, 3)) - 1).abs() < 0.3).all()


def test_it_draws_something_else_for_another_prompt_from_the_same_noise(pipeline: Flux2KleinPipeline) -> None:
    fox, leaf, again = draw(
        pipeline,
        ["a flat icon of fox", "a flat icon of four leaf clover", "a flat icon of fox"],
        num_inference_steps=8,
    )
    assert np.array_equal(np.asarray(fox), np.asarray(again))
    (fox_colour, leaf_colour) = (np.asarray(image, float).mean(axis=(0, 1)) for image in (fox, leaf))
    assert fox_colour[0] - fox_colour[1] > 10, "a fox is redder than green"
    assert leaf_colour[1] - leaf_colour[0] > 10, "a leaf is greener than red"


def test_it_runs_with_kleins_own_padding(pipeline: Flux2KleinPipeline) -> None:
    """512 tokens, nearly all of them padding, change an icon but little."""
    short, padded = (
        np.asarray(draw(pipeline, ["a flat icon of fox"], num_inference_steps=8, **asked)[0], float)
        for asked in ({}, {"max_sequence_length": 512})
    )
    other = np.asarray(draw(pipeline, ["a flat icon of four leaf clover"], num_inference_steps=8)[0], float)
    assert np.abs(short - padded).mean() < np.abs(short - other).mean() / 2


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TINY / "quality.json").read_text(encoding="utf-8"))
    return found


def test_the_readmes_figures_are_those_of_the_report(report: dict[str, Any]) -> None:
    readme = (TINY / "README.md").read_text(encoding="utf-8")
    assert quality_table(report) in readme
    prose = " ".join(readme.split())
    judge, second = (report["names"][name]["known"] for name in ("judge", "second_judge"))
    assert f"finds the right name for {judge:.1%} of what it draws, a second judge for {second:.1%}" in prose
    megabytes = (TINY / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6
    assert f"{megabytes:.1f} MB" in prose
