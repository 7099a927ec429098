"""Comparable losses: fixed images, noise and timesteps, without augmentation, dropout or weight noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from flatlora_diffusion.data.crops import choose_view, image_to_tensor, view_image
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.images import load_image
from flatlora_diffusion.data.latents import check_latents
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.sdxl.objective import Batch, Objective, sample_losses
from flatlora_diffusion.sdxl.pipeline import Sdxl, add_time_ids, encode_images, encode_prompts
from flatlora_diffusion.sdxl.sampling import eval_mode
from flatlora_diffusion.storage.rng import FLATNESS, generator

# Limits of a batch for the VAE and the UNet: one image of 1024 x 1024 pixels.
_PIXELS, _LATENTS = 1024**2, 128**2


@dataclass(frozen=True)
class Probe:
    """N fixed images, each with `draws` fixed (noise, timestep) pairs: N * draws samples."""

    batch: Batch
    noise: Tensor
    timesteps: Tensor
    draws: int


def fixed_probe(
    sdxl: Sdxl, samples: Sequence[Sample], resolution: int, seed: int, draws: int = 8, background: str = "white"
) -> Probe:
    """Create the probe of `samples`: centre crops, posterior means and stratified timesteps."""
    device = sdxl.unet.device
    centred = [_centre_crop(load_image(sample.source, background), resolution) for sample in samples]
    pixels, sizes, crops = zip(*centred, strict=True)
    batch_size = _batch_size(16, resolution**2, _PIXELS)
    latents = torch.cat([encode_images(sdxl.vae, part.to(device)) for part in torch.stack(pixels).split(batch_size)])
    check_latents(latents, samples)
    prompt_embeds, pooled = encode_prompts(sdxl, [sample.caption for sample in samples])
    batch = Batch(latents, prompt_embeds, pooled, add_time_ids(sizes, crops, (resolution, resolution), device))
    noise, timesteps = _draws(latents, seed, draws, sdxl.scheduler.config.num_train_timesteps)
    repeated = batch.map(lambda value: value.repeat_interleave(draws, dim=0))
    return Probe(repeated, noise, timesteps, draws)


def resample(probe: Probe, seed: int, train_timesteps: int) -> Probe:
    """Return `probe` with noise and timesteps of another seed, as `fixed_probe` creates it with that seed."""
    latents = probe.batch.latents[:: probe.draws]
    noise, timesteps = _draws(latents, seed, probe.draws, train_timesteps)
    return replace(probe, noise=noise, timesteps=timesteps)


def _draws(latents: Tensor, seed: int, draws: int, train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Return noise (N * draws, ...) and timesteps (N * draws,) for latents (N, ...), one timestep per stratum."""
    rng = generator("cpu", seed, "probe")
    noise = torch.randn((len(latents) * draws, *latents.shape[1:]), generator=rng)
    strata = (torch.arange(draws) + torch.rand(len(latents), draws, generator=rng)) / draws
    timesteps = (strata * train_timesteps).long().flatten()
    return noise.to(latents.device), timesteps.to(latents.device)


def with_prompts(probe: Probe, sdxl: Sdxl, captions: Sequence[str]) -> Probe:
    """Return `probe` with N captions encoded by the current text encoders."""
    prompt_embeds, pooled = (value.repeat_interleave(probe.draws, dim=0) for value in encode_prompts(sdxl, captions))
    return replace(probe, batch=replace(probe.batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled))


@torch.no_grad()
def draw_losses(
    unet: UNet2DConditionModel, objective: Objective, probe: Probe, batch_size: int | None = None
) -> Tensor:
    """Return the denoising loss of each draw of each image, (N, draws) fp64 on the CPU."""
    losses = []
    batch_size = batch_size or _batch_size(32, probe.noise.shape[-1] * probe.noise.shape[-2], _LATENTS)
    with eval_mode(unet):
        for start in range(0, len(probe.timesteps), batch_size):
            part = slice(start, start + batch_size)
            batch = probe.batch.map(lambda value, part=part: value[part])  # type: ignore[misc]
            losses.append(sample_losses(unet, objective, batch, probe.noise[part], probe.timesteps[part]))
    return torch.cat(losses).cpu().double().view(-1, probe.draws)


def probe_losses(
    unet: UNet2DConditionModel, objective: Objective, probe: Probe, batch_size: int | None = None
) -> Tensor:
    """Return the denoising loss of each image, (N,) fp64 on the CPU: the mean over its draws."""
    return draw_losses(unet, objective, probe, batch_size).mean(dim=1)


def probe_loss(unet: UNet2DConditionModel, objective: Objective, probe: Probe, batch_size: int | None = None) -> float:
    """Return the mean denoising loss of `unet` on the probe."""
    return float(probe_losses(unet, objective, probe, batch_size).mean())


def loss_increases(
    unet: UNet2DConditionModel, objective: Objective, probe: Probe, sigma: float, draws: int, seed: int
) -> list[float]:
    """Return the increase of the probe's loss under each of `draws` filter-wise perturbations (Eq. 7) of W'.

    The perturbations are functions of `seed`, equal for all LoRAs of a base, and differ from those of training.
    """
    flat = FlatLora(unet, sigma=sigma, schedule="constant", seed=seed, prefix=FLATNESS, draw="full")
    try:
        clean = probe_loss(unet, objective, probe)
        increases = []
        for draw in range(draws):
            with flat.perturb(step=draw):
                increases.append(probe_loss(unet, objective, probe) - clean)
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
