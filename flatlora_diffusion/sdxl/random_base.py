"""A base of random weights in the shapes of a real one, made on its device: to try a device without a download."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTokenizer

from flatlora_diffusion.config import TEXT_PARTS, TINY, ModelConfig
from flatlora_diffusion.sdxl.loading import base_path, one_at_a_time
from flatlora_diffusion.sdxl.pipeline import Sdxl, framed
from flatlora_diffusion.sdxl.shapes import on_meta
from flatlora_diffusion.storage.rng import generator


def random_sdxl(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Sdxl:
    """A base with the shapes of the one that `config` names, or of SDXL, and the tiny base's tokenizers.

    Its VAE is fp32 as ever; a weight has the variance that keeps what passes through it of one size.
    """
    parts = {part: _random(on_meta(config, part), device, dtype) for part in ("unet", *TEXT_PARTS)}
    tokenizers = {
        name: CLIPTokenizer.from_pretrained(f"{base_path(TINY)}/{name}") for name in ("tokenizer", "tokenizer_2")
    }
    pipeline = StableDiffusionXLPipeline(
        vae=one_at_a_time(_random(on_meta(config, "vae"), device, torch.float32)),
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
    return framed(pipeline, config)


def _random(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """`model`, which is on the meta device, on `device` with weights."""
    model = model.to(dtype).to_empty(device=device)
    rng = generator(device, 0, "random_base")
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim > 1:
                    weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=rng)
                else:  # norms have weights of 1, and nothing has a bias
                    weight.fill_(float(name == "weight"))
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
            else:
                buffer.zero_()
    assert isinstance(model, nn.Module)
    return model.requires_grad_(False).eval()
