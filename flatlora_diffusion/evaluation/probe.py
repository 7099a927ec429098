"""Comparable losses: fixed images, noise and timesteps, without augmentation, dropout or weight noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn

from flatlora_diffusion.data.crops import choose_view, image_to_tensor, view_image
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.images import load_image
from flatlora_diffusion.data.latents import check_latents
from flatlora_diffusion.families.base import Base, eval_mode
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.objective import Objective, sample_losses
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.storage.rng import FLATNESS, generator

# Limits of a batch for the VAE and the denoiser: one image of 1024 x 1024 pixels.
_PIXELS, _LATENTS = 1024**2, 128**2


@dataclass(frozen=True)
class Probe:
    """N fixed images, each with `draws` fixed (noise, timestep) pairs: N * draws samples."""

    batch: Batch
    noise: Tensor
    timesteps: Tensor
    draws: int


def fixed_probe(
    base: Base, samples: Sequence[Sample], resolution: int, seed: int, draws: int = 8, background: str = "white"
) -> Probe:
    """Create the probe of `samples`: centre crops, posterior means and stratified timesteps."""
    device = base.denoiser.device
    centred = [_centre_crop(load_image(sample.source, background), resolution) for sample in samples]
    pixels, sizes, crops = zip(*centred, strict=True)
    batch_size = _batch_size(16, resolution**2, _PIXELS)
    parts = torch.stack(pixels).split(batch_size)
    latents = torch.cat([base.posterior(part.to(device))[0] for part in parts])
    check_latents(latents, samples)
    prompts = base.encode_prompts([sample.caption for sample in samples])
    geometry = base.geometry(sizes, crops, (resolution, resolution))
    batch = Batch(latents, prompts, {name: value.to(device) for name, value in geometry.items()})
    noise, timesteps = _draws(base, latents, seed, draws)
    repeated = batch.map(lambda value: value.repeat_interleave(draws, dim=0))
    return Probe(repeated, noise, timesteps, draws)


def resample(probe: Probe, base: Base, seed: int) -> Probe:
    """Return `probe` with noise and timesteps of another seed, as `fixed_probe` creates it with that seed."""
    latents = probe.batch.latents[:: probe.draws]
    noise, timesteps = _draws(base, latents, seed, probe.draws)
    return replace(probe, noise=noise, timesteps=timesteps)


def _draws(base: Base, latents: Tensor, seed: int, draws: int) -> tuple[Tensor, Tensor]:
    """Return noise (N * draws, ...) and timesteps (N * draws,) for latents (N, ...), one timestep per stratum."""
    rng = generator("cpu", seed, "probe")
    noise = torch.randn((len(latents) * draws, *latents.shape[1:]), generator=rng)
    strata = (torch.arange(draws) + torch.rand(len(latents), draws, generator=rng)) / draws
    timesteps = base.timesteps_at(strata).flatten()
    return noise.to(latents.device), timesteps.to(latents.device)


def with_prompts(probe: Probe, base: Base, captions: Sequence[str]) -> Probe:
    """Return `probe` with N captions encoded by the current text encoders."""
    embeds = base.encode_prompts(captions)
    prompts = {name: value.repeat_interleave(probe.draws, dim=0) for name, value in embeds.items()}
    return replace(probe, batch=replace(probe.batch, prompts=prompts))


@torch.no_grad()
def draw_losses(denoiser: nn.Module, objective: Objective, probe: Probe, batch_size: int | None = None) -> Tensor:
    """Return the denoising loss of each draw of each image, (N, draws) fp64 on the CPU."""
    losses = []
    batch_size = batch_size or _batch_size(32, probe.noise.shape[-1] * probe.noise.shape[-2], _LATENTS)
    with eval_mode(denoiser):
        for start in range(0, len(probe.timesteps), batch_size):
            part = slice(start, start + batch_size)
            batch = probe.batch.map(lambda value, part=part: value[part])  # type: ignore[misc]
            losses.append(sample_losses(denoiser, objective, batch, probe.noise[part], probe.timesteps[part]))
    return torch.cat(losses).cpu().double().view(-1, probe.draws)


def probe_losses(denoiser: nn.Module, objective: Objective, probe: Probe, batch_size: int | None = None) -> Tensor:
    """Return the denoising loss of each image, (N,) fp64 on the CPU: the mean over its draws."""
    return draw_losses(denoiser, objective, probe, batch_size).mean(dim=1)


def probe_loss(denoiser: nn.Module, objective: Objective, probe: Probe, batch_size: int | None = None) -> float:
    """Return the mean denoising loss of `denoiser` on the probe."""
    return float(probe_losses(denoiser, objective, probe, batch_size).mean())


def loss_increases(
    denoiser: nn.Module, objective: Objective, probe: Probe, sigma: float, draws: int, seed: int
) -> list[float]:
    """Return the increase of the probe's loss under each of `draws` filter-wise perturbations (Eq. 7) of W'.

    The perturbations are functions of `seed`, equal for all LoRAs of a base, and differ from those of training.
    """
    flat = FlatLora(denoiser, sigma=sigma, schedule="constant", seed=seed, prefix=FLATNESS, draw="full")
    try:
        clean = probe_loss(denoiser, objective, probe)
        increases = []
        for draw in range(draws):
            with flat.perturb(step=draw):
                increases.append(probe_loss(denoiser, objective, probe) - clean)
        return increases
    finally:
        flat.detach()


def _centre_crop(image: Image.Image, resolution: int) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """Return pixels (3, R, R) in [-1, 1] of the centre square, the image's (height, width), the crop's (top, left)."""
    unused = torch.Generator()  # a centre crop without mirroring uses no random numbers
    view = choose_view((image.height, image.width), (resolution, resolution), True, False, unused)
    return image_to_tensor(view_image(image, view, "lanczos")), view.original_size, view.crop_top_left


def _batch_size(limit: int, area: int, total_area: int) -> int:
    return max(1, min(limit, total_area // area))
