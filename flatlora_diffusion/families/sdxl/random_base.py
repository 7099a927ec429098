"""A base with random weights in the shapes of a real base, to test a device without a download."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTokenizer

from flatlora_diffusion.config import TEXT_PARTS, TINY, ModelConfig
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, wrap_pipeline
from flatlora_diffusion.families.sdxl.shapes import on_meta
from flatlora_diffusion.storage.rng import generator


def random_sdxl(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Sdxl:
    """Create a base with the shapes of the base in `config`, or of SDXL, and the tiny base's tokenizers.

    Weights preserve the variance of their inputs; the VAE is fp32.
    """
    parts = {part: _random(on_meta(config, part), device, dtype) for part in ("unet", *TEXT_PARTS)}
    tokenizers = {
        name: CLIPTokenizer.from_pretrained(f"{base_path(TINY)}/{name}") for name in ("tokenizer", "tokenizer_2")
    }
    pipeline = StableDiffusionXLPipeline(
        vae=_random(on_meta(config, "vae"), device, torch.float32),
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


def _random(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move `model` from the meta device to `device` with random weights."""
    model = model.to(dtype).to_empty(device=device)
    rng = generator(device, 0, "random_base")
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim > 1:
                    weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=rng)
                else:  # 1 for the weights of norms, 0 for biases
                    weight.fill_(float(name == "weight"))
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
            else:
                buffer.zero_()
    assert isinstance(model, nn.Module)
    return model.requires_grad_(False).eval()
