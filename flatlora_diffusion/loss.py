"""The training objective: tensors in, a scalar out. Noise and timesteps are arguments: the loss is deterministic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What the UNet sees of B images.

    latents (B, 4, h, w), prompt_embeds (B, 77, D), pooled_prompt_embeds (B, P), add_time_ids (B, 6).
    """

    latents: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    add_time_ids: Tensor


def draw_targets(scheduler: DDPMScheduler, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise of the latents' shape and one uniform timestep per image, from `rng` alone."""
    noise = torch.randn(latents.shape, generator=rng, device=latents.device, dtype=torch.float32)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (latents.shape[0],), generator=rng, device=latents.device)
    return noise, timesteps


def diffusion_loss(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, batch: Batch, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error of the noise (or velocity) prediction, a scalar in fp32."""
    return sample_losses(unet, scheduler, batch, noise, timesteps).mean()


def sample_losses(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, batch: Batch, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """The loss of each image, (B,) fp32."""
    dtype = batch.prompt_embeds.dtype
    noisy = scheduler.add_noise(batch.latents, noise, timesteps)
    output = unet(
        noisy.to(dtype),
        timesteps,
        batch.prompt_embeds,
        added_cond_kwargs={"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.add_time_ids},
        return_dict=False,
    )[0]
    target = _target(scheduler, batch.latents, noise, timesteps)
    return F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def _target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"unknown prediction_type {scheduler.config.prediction_type!r} in the base's scheduler")
