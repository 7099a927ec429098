"""A base with random weights in the shapes of a real base, to test a device without a download."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from flatlora_diffusion.config import TEXT_PARTS, TINY, ModelConfig
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.families.random_weights import random_weights
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, wrap_pipeline
from flatlora_diffusion.families.sdxl.shapes import on_meta


def random_sdxl(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Sdxl:
    """Create a base with the shapes of the base in `config`, or of SDXL, and the tiny base's tokenizers.

    Weights preserve the variance of their inputs; the VAE is fp32.
    """
    parts = {part: random_weights(on_meta(config, part), device, dtype) for part in ("unet", *TEXT_PARTS)}
    tokenizers = {
        name: CLIPTokenizer.from_pretrained(f"{base_path(TINY)}/{name}") for name in ("tokenizer", "tokenizer_2")
    }
    pipeline = StableDiffusionXLPipeline(
        vae=random_weights(on_meta(config, "vae"), device, torch.float32),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
        **parts,
        **tokenizers,
    )
    return wrap_pipeline(pipeline, config)
