"""The estimate of FLUX.2 klein 4B on the meta device, against sums by hand."""

from __future__ import annotations

import pytest
import torch

from flatlora_diffusion.config import KLEIN, AdapterConfig, ModelConfig
from flatlora_diffusion.families.klein.family import KleinFamily
from flatlora_diffusion.memory.meta_step import TrainedModel, measure_step, measure_vae, weight_count

MODEL = ModelConfig(KLEIN)
GIB = 2**30


def test_the_parts_of_klein_4b_take_seven_and_eight_gib_in_bf16() -> None:
    sizes = {part: 2 * weight_count(MODEL, part) / GIB for part in KleinFamily().parts}
    assert sizes["transformer"] == pytest.approx(7.22, abs=0.01)
    assert sizes["text_encoder"] == pytest.approx(7.49, abs=0.01)
    assert 2 * sizes["vae"] == pytest.approx(0.31, abs=0.01)  # in fp32


def test_inputs_of_a_step_have_the_shapes_of_the_pipeline() -> None:
    latents, levels, prompts = KleinFamily().step_inputs(MODEL, 2, 1024, torch.bfloat16, False)
    assert (latents.shape, levels.shape, prompts.shape) == ((2, 128, 64, 64), (2,), (2, 512, 7680))
    assert KleinFamily().prompt_numbers(MODEL) == 512 * 7680


def test_a_step_of_klein_4b_is_measured_without_weights() -> None:
    """With checkpointing the saved tensors are the inputs of 25 blocks and of what is outside them."""
    trained = TrainedModel(MODEL, AdapterConfig(rank=16))
    small, large = (
        measure_step(trained, torch.bfloat16, torch.bfloat16, 1, resolution, True) for resolution in (512, 1024)
    )
    assert len(large.adapted) == 60
    assert sum(shape.numel() for shape in large.adapted) == 2_642_411_520
    assert sum(shape.numel() for shape in large.trained) == 16 * sum(sum(shape) for shape in large.adapted)
    tokens = 512 + 64 * 64
    assert large.saved > 25 * tokens * 3072 * 2
    assert large.saved < large.peak < 8 * GIB
    assert small.peak < large.peak


def test_the_vae_decodes_an_image_of_1024_pixels_in_a_few_gib() -> None:
    vae = measure_vae(MODEL, torch.float32, 1, 1024)
    assert 0 < vae.encode_peak < 8 * GIB
    assert 0 < vae.decode_peak < 8 * GIB
