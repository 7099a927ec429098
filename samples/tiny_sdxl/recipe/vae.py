"""The base's VAE: f = 4, 4 latent channels, trained on the flat icons alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor

from flatlora_diffusion.storage.rng import generator
from samples.tiny_sdxl.recipe.loop import Schedule, train

SCHEDULE = Schedule(steps=3000, learning_rate=1.5e-3, warmup=100, weight_decay=0.0)
BATCH = 16
KL_WEIGHT = 1e-6


def build_vae() -> AutoencoderKL:
    """A randomly initialized VAE; call under a fixed seed."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )
    # Start with little posterior noise: at the usual std of 1 the latents drown in it and collapse to zero.
    vae.quant_conv.bias.data[vae.config.latent_channels :] = -6.0
    return vae


def to_pixels(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """(B, H, W, 3) uint8 as (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Shifts of up to 4 pixels, flips, and smooth changes of illumination as a rendered 3D icon has them."""
    batch, _, height, width = pixels.shape
    padded = F.pad(pixels, (4, 4, 4, 4), value=1.0)
    shifts = torch.randint(0, 9, (batch, 2), generator=rng).tolist()
    flips = torch.rand(batch, generator=rng) < 0.5
    moved = [
        (row.flip(-1) if flip else row)[:, dy : dy + height, dx : dx + width]
        for row, (dy, dx), flip in zip(padded, shifts, flips, strict=True)
    ]
    light = F.interpolate(torch.randn(batch, 3, 3, 3, generator=rng) * 0.15, (height, width), mode="bicubic")
    lit = torch.rand(batch, 1, 1, 1, generator=rng) < 0.5
    return (torch.stack(moved) + light * lit).clamp(-1, 1)


def train_vae(images: np.ndarray[Any, np.dtype[np.uint8]], work: Path) -> AutoencoderKL:
    """Train on (N, 64, 64, 3) flat icons with L1 + L2 + gradient loss; sets the latents' mean and std per channel."""
    torch.manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        rng = generator("cpu", 0, "vae", step)
        rows = torch.randint(0, len(images), (BATCH,), generator=rng).numpy()
        pixels = augment(to_pixels(images[rows]), rng).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
            output = vae.decode(latents).sample.float()
        difference = output - pixels
        gradients = sum(difference.diff(dim=dim).abs().mean() for dim in (-1, -2))
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return difference.abs().mean() + difference.square().mean() + gradients + KL_WEIGHT * kl

    train(vae, loss_at, SCHEDULE, work / "vae.safetensors")
    vae.eval()
    latents = torch.cat([encode(vae, to_pixels(images[i : i + 64])) for i in range(0, len(images), 64)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL | AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """The posterior's mean, (B, 4, H/4, W/4), not normalized."""
    return vae.encode(pixels).latent_dist.mean


@torch.no_grad()
def psnr(vae: AutoencoderKL | AutoencoderKLFlux2, images: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Mean over images of the PSNR in dB of the reconstruction, on pixels in [0, 255]."""
    error = (reconstructed(vae, images) - to_pixels(images)) / 2
    return float((-10 * error.square().mean(dim=(1, 2, 3)).log10()).mean())


@torch.no_grad()
def reconstructed(vae: AutoencoderKL | AutoencoderKLFlux2, images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """The images after the VAE, (B, 3, H, W) in [-1, 1]."""
    parts = [to_pixels(images[start : start + 64]) for start in range(0, len(images), 64)]
    return torch.cat([vae.decode(encode(vae, pixels)).sample.clamp(-1, 1) for pixels in parts])
