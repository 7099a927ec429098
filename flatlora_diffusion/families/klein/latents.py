"""Images as the transformer's latents, and latents as sequences of tokens with positions.

A patch of 2 x 2 latent pixels of the VAE is one latent pixel here, normalized by the statistics of the VAE's batch
norm: (B, 4C, h, w) for images of 16h x 16w pixels with FLUX.2's VAE, where 4C = 128.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

PATCH = 2  # latent pixels of the VAE
TILE = 1024  # pixels


def decode_one_by_one(vae: AutoencoderKLFlux2) -> AutoencoderKLFlux2:
    """Configure `vae` to process the images of a batch one by one, with tiles of TILE pixels; returns it."""
    vae.enable_slicing()
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // vae_factor(vae)
    return vae


def vae_factor(vae: AutoencoderKLFlux2) -> int:
    """Return the pixels per latent pixel of the VAE in each direction."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def posterior(vae: AutoencoderKLFlux2, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalized mode of the posterior and a std of 0, (B, 1, 1, 1): klein is trained on the mode."""
    mode = encode_images(vae, pixels)
    return mode, mode.new_zeros(len(mode), 1, 1, 1)


@torch.no_grad()
def encode_images(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """Return the normalized mode of the posterior, (B, 4C, h, w) fp32, of pixels (B, 3, H, W) in [-1, 1]."""
    patches = to_patches(vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float())
    mean, std = _patch_statistics(vae, patches.device)
    return (patches - mean) / std


@torch.no_grad()
def decode_latents(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """Decode normalized latents (B, 4C, h, w) in the VAE's dtype to pixels (B, 3, H, W) fp32.

    Images larger than 1024 pixels are decoded in overlapping tiles.
    """
    mean, std = _patch_statistics(vae, latents.device)
    vae.enable_tiling()  # not for encoding: the model would learn the seams
    try:
        pixels: Tensor = vae.decode(from_patches(latents.float() * std + mean).to(vae.dtype)).sample.float()
        return pixels
    finally:
        vae.disable_tiling()


def to_patches(latents: Tensor) -> Tensor:
    """Move each 2 x 2 patch of (B, C, 2h, 2w) to the channels: (B, 4C, h, w)."""
    return torch.pixel_unshuffle(latents, PATCH)


def from_patches(patches: Tensor) -> Tensor:
    """Undo `to_patches`."""
    return torch.pixel_shuffle(patches, PATCH)


def to_tokens(latents: Tensor) -> Tensor:
    """Make a token of each latent pixel, row by row: (B, 4C, h, w) to (B, h w, 4C)."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def image_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Return the positions (time, row, column, index in the text) of an image's tokens, (h w, 4)."""
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (height, width)), indexing="ij"))
    zeros = torch.zeros_like(rows)
    return torch.stack([zeros, rows, columns, zeros], dim=1).to(device)


def text_positions(length: int, device: torch.device) -> Tensor:
    """Return the positions (time, row, column, index in the text) of a prompt's tokens, (L, 4)."""
    return torch.nn.functional.pad(torch.arange(length)[:, None], (3, 0)).to(device)


def _patch_statistics(vae: AutoencoderKLFlux2, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std of the channels of patches, (1, 4C, 1, 1) fp32."""
    statistics = vae.bn.running_mean, vae.bn.running_var
    mean, variance = (value.float().view(1, -1, 1, 1).to(device) for value in statistics)
    return mean, (variance + vae.config.batch_norm_eps).sqrt()
