"""SDXL's VAE: pixels and normalized latents, its precision, and decoding in little memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

TILE = 1024  # pixels


def decode_one_by_one(vae: AutoencoderKL) -> AutoencoderKL:
    """Configure `vae` to process the images of a batch one by one, with tiles of TILE pixels; returns it."""
    vae.enable_slicing()
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae


def vae_dtype(settings: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a VAE with this config that replaces the base's VAE, for a base in `dtype`."""
    supports_fp16 = not settings.get("force_upcast", True)
    # Not bf16, which is too coarse for colours.
    return torch.float16 if supports_fp16 and dtype != torch.float32 else torch.float32


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std of the normalized latents, (B, 4, H/f, W/f) fp32, of pixels (B, 3, H, W) in [-1, 1]."""
    distribution = vae.encode(pixels.to(vae.dtype)).latent_dist
    mean, std = _latent_statistics(vae, distribution.mean.device)
    scale = vae.config.scaling_factor / std
    return (distribution.mean.float() - mean) * scale, distribution.std.float() * scale


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode normalized latents in the VAE's dtype to pixels (B, 3, H, W) fp32.

    Images are decoded one by one, and in overlapping tiles of 1024 pixels if they are larger.
    """
    mean, std = _latent_statistics(vae, latents.device)
    vae.enable_tiling()  # not for encoding: the model would learn the seams
    try:
        return vae.decode((latents.float() / vae.config.scaling_factor * std + mean).to(vae.dtype)).sample.float()
    finally:
        vae.disable_tiling()


def _latent_statistics(vae: AutoencoderKL, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std of the latents per channel, (1, C, 1, 1); 0 and 1 if the VAE has none, as SDXL's."""
    channels = vae.config.latent_channels
    mean = getattr(vae.config, "latents_mean", None) or [0.0] * channels
    std = getattr(vae.config, "latents_std", None) or [1.0] * channels
    return torch.tensor(mean, device=device).view(1, -1, 1, 1), torch.tensor(std, device=device).view(1, -1, 1, 1)
