"""Losses that can be compared: fixed images, noise and timesteps, no augmentation, no dropout, no perturbation."""

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

# What goes through the VAE and the UNet at once: an image of 1024 pixels alone.
_PIXELS, _LATENTS = 1024**2, 128**2


@dataclass(frozen=True)
class Probe:
    """N fixed images, each with `draws` fixed (noise, timestep) pairs: the whole is (N * draws) samples."""

    batch: Batch
    noise: Tensor
    timesteps: Tensor
    draws: int


def fixed_probe(
    sdxl: Sdxl, samples: Sequence[Sample], resolution: int, seed: int, draws: int = 8, background: str = "white"
) -> Probe:
    """The probe of `samples`: centre crops, posterior means, timesteps stratified so that each part of time counts."""
    device = sdxl.unet.device
    centred = [_centre_crop(load_image(sample.source, background), resolution) for sample in samples]
    pixels, sizes, crops = zip(*centred, strict=True)
    together = _at_once(16, resolution**2, _PIXELS)
    latents = torch.cat([encode_images(sdxl.vae, part.to(device)) for part in torch.stack(pixels).split(together)])
    check_latents(latents, samples)
    prompt_embeds, pooled = encode_prompts(sdxl, [sample.caption for sample in samples])
    batch = Batch(latents, prompt_embeds, pooled, add_time_ids(sizes, crops, (resolution, resolution), device))
    noise, timesteps = _draws(latents, seed, draws, sdxl.scheduler.config.num_train_timesteps)
    repeated = batch.map(lambda value: value.repeat_interleave(draws, dim=0))
    return Probe(repeated, noise, timesteps, draws)


def redrawn(probe: Probe, seed: int, train_timesteps: int) -> Probe:
    """`probe` with the noise and timesteps of another seed: the probe that `fixed_probe` makes with that seed."""
    latents = probe.batch.latents[:: probe.draws]
    noise, timesteps = _draws(latents, seed, probe.draws, train_timesteps)
    return replace(probe, noise=noise, timesteps=timesteps)


def _draws(latents: Tensor, seed: int, draws: int, train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Noise (N * draws, ...) and timesteps (N * draws,) for (N, ...) latents, each draw in its own part of time."""
    rng = generator("cpu", seed, "probe")
    noise = torch.randn((len(latents) * draws, *latents.shape[1:]), generator=rng)
    strata = (torch.arange(draws) + torch.rand(len(latents), draws, generator=rng)) / draws
    timesteps = (strata * train_timesteps).long().flatten()
    return noise.to(latents.device), timesteps.to(latents.device)


def with_prompts(probe: Probe, sdxl: Sdxl, captions: Sequence[str]) -> Probe:
    """`probe` with the (N,) captions as the text encoders encode them now."""
    prompt_embeds, pooled = (value.repeat_interleave(probe.draws, dim=0) for value in encode_prompts(sdxl, captions))
    return replace(probe, batch=replace(probe.batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled))


@torch.no_grad()
def draw_losses(
    unet: UNet2DConditionModel, objective: Objective, probe: Probe, batch_size: int | None = None
) -> Tensor:
    """The denoising loss of each draw of each image of the probe, (N, draws) fp64 on the CPU."""
    losses = []
    batch_size = batch_size or _at_once(32, probe.noise.shape[-1] * probe.noise.shape[-2], _LATENTS)
    with eval_mode(unet):
        for start in range(0, len(probe.timesteps), batch_size):
            part = slice(start, start + batch_size)
            batch = probe.batch.map(lambda value, part=part: value[part])  # type: ignore[misc]
            losses.append(sample_losses(unet, objective, batch, probe.noise[part], probe.timesteps[part]))
    return torch.cat(losses).cpu().double().view(-1, probe.draws)


def probe_losses(
    unet: UNet2DConditionModel, objective: Objective, probe: Probe, batch_size: int | None = None
) -> Tensor:
    """The denoising loss of each image of the probe, (N,) fp64 on the CPU: the mean over its draws."""
    return draw_losses(unet, objective, probe, batch_size).mean(dim=1)


def probe_loss(unet: UNet2DConditionModel, objective: Objective, probe: Probe, batch_size: int | None = None) -> float:
    """The mean denoising loss of `unet` on the probe; the same number for the same weights."""
    return float(probe_losses(unet, objective, probe, batch_size).mean())


def loss_rise(
    unet: UNet2DConditionModel, objective: Objective, probe: Probe, sigma: float, draws: int, seed: int
) -> list[float]:
    """How much each of `draws` filter-wise perturbations of the merged weights (Eq. 7) lifts the probe's loss.

    The perturbations are functions of `seed`, so two LoRAs of one base are compared under common draws; none of them
    is one of training.
    """
    flat = FlatLora(unet, sigma=sigma, schedule="constant", seed=seed, prefix=FLATNESS, draw="full")
    try:
        clean = probe_loss(unet, objective, probe)
        rises = []
        for draw in range(draws):
            with flat.perturb(step=draw):
                rises.append(probe_loss(unet, objective, probe) - clean)
        return rises
    finally:
        flat.detach()


def _centre_crop(image: Image.Image, resolution: int) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """Pixels (3, R, R) in [-1, 1] of the centre square, the image's (height, width) and the crop's (top, left)."""
    no_draws = torch.Generator()  # whose numbers a centre crop without mirroring does not use
    view = choose_view((image.height, image.width), (resolution, resolution), True, False, no_draws)
    return image_to_tensor(view_image(image, view, "lanczos")), view.original_size, view.crop_top_left


def _at_once(most: int, area: int, room: int) -> int:
    return max(1, min(most, room // area))
