"""Images from prompts and seeds with a base and, when one is attached, its LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import nn

from flatlora_diffusion.sdxl import Sdxl, decode_latents


@torch.no_grad()
def generate_images(
    sdxl: Sdxl,
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int,
    steps: int = 25,
    guidance: float = 5.0,
    batch_size: int = 8,
) -> list[Image.Image]:
    """One image per (prompt, seed). The first noise is drawn on the CPU from the seed, so all devices start alike."""
    images: list[Image.Image] = []
    pairs = list(zip(prompts, seeds, strict=True))
    with evaluating(sdxl.unet):
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            latents = sdxl.pipeline(
                prompt=[prompt for prompt, _ in part],
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in part],
                output_type="latent",
            ).images
            pixels = decode_latents(sdxl.vae, latents)
            images += sdxl.pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
