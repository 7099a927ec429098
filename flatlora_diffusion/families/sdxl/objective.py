"""SDXL's objective: noise, velocity or EDM, with loss weights and kinds of noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from flatlora_diffusion.config import ConfigError, LossType, ObjectiveConfig
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.objective import Objective, timestep_range

MAX_DEBIASED_SNR = 1000.0  # as in sd-scripts


@dataclass(frozen=True)
class SdxlObjective(Objective):
    """The noise process and the loss.

    scheduler: a DDPMScheduler, or an EDM scheduler of diffusers.
    edm: compare denoised latents with weights, as in arXiv:2206.00364, instead of noise or velocity.
    input_perturbation: gamma of arXiv:2301.11706.
    """

    scheduler: Any
    edm: bool = False
    loss_type: LossType = "l2"
    snr_gamma: float | None = None
    debiased: bool = False
    noise_offset: float = 0.0
    multires: tuple[int, float] = (0, 0.0)  # number of coarser noises, and the discount per level
    input_perturbation: float = 0.0
    timesteps: tuple[int, int | None] = (0, None)  # first and last; None for the scheduler's last

    def unweighted(self) -> SdxlObjective:
        return SdxlObjective(self.scheduler, edm=self.edm)

    def draw(self, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample noise and uniform timesteps, which are indices."""
        noise = torch.randn(latents.shape, generator=rng, device=latents.device, dtype=torch.float32)
        first, last = self.timesteps
        end = self.scheduler.config.num_train_timesteps if last is None else last + 1
        timesteps = torch.randint(first, end, (latents.shape[0],), generator=rng, device=latents.device)
        if self.noise_offset:
            shape = (*latents.shape[:2], 1, 1)
            noise = noise + self.noise_offset * torch.randn(shape, generator=rng, device=latents.device)
        if self.multires[0]:
            noise = _multires(noise, *self.multires, rng)
        return noise, timesteps

    def with_input_perturbation(self, batch: Batch, rng: torch.Generator) -> Batch:
        if not self.input_perturbation:
            return batch
        noise = torch.randn(batch.latents.shape, generator=rng, device=batch.latents.device)
        return replace(batch, input_perturbation=self.input_perturbation * noise)

    def compared(
        self, model: nn.Module, batch: Batch, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return noise or velocity, or with `edm` denoised latents; their target and weights (B,) or None."""
        scheduler = self.scheduler
        if self.edm:
            return _edm_prediction_target_weights(model, scheduler, batch, noise, timesteps)
        noisy = scheduler.add_noise(batch.latents, _perturbed_noise(batch, noise), timesteps)
        prediction = _forward(model, noisy, timesteps, batch)
        return prediction, _target(scheduler, batch.latents, noise, timesteps), _weights(self, timesteps)


def objective_of(config: ObjectiveConfig, scheduler: Any) -> SdxlObjective:
    """Create the objective for a base with `scheduler`.

    Raises ConfigError for a loss weighting or noise that is not defined for the base.
    """
    for name, is_on in (
        ("snr_gamma", config.snr_gamma is not None),
        ("debiased_estimation", config.debiased_estimation),
    ):
        if is_on and is_edm_scheduler(scheduler):
            raise ConfigError(f"--{name} does not fit this base, whose scheduler is EDM; leave it out")
    if config.do_edm_style_training and scheduler.config.get("rescale_betas_zero_snr"):
        raise ConfigError(
            "--do_edm_style_training does not fit this base, whose last timestep is pure noise (zero terminal SNR), "
            "which has no sigma; leave it out"
        )
    return SdxlObjective(
        scheduler,
        edm=config.do_edm_style_training or is_edm_scheduler(scheduler),
        loss_type=config.loss_type,
        snr_gamma=config.snr_gamma,
        debiased=config.debiased_estimation,
        noise_offset=config.noise_offset,
        multires=(config.multires_noise_iterations, config.multires_noise_discount),
        input_perturbation=config.ip_noise_gamma,
        timesteps=timestep_range(config, scheduler.config.num_train_timesteps - 1),
    )


def _multires(noise: Tensor, levels: int, discount: float, rng: torch.Generator) -> Tensor:
    """Add up to `levels` coarser noises, each half the size of the last, and normalize each image to std 1."""
    height, width = noise.shape[-2:]
    for level in range(1, levels + 1):
        size = max(1, height >> level), max(1, width >> level)
        coarse = torch.randn((*noise.shape[:2], *size), generator=rng, device=noise.device)
        noise = noise + discount**level * F.interpolate(coarse, (height, width), mode="bilinear")
        if size == (1, 1):
            break
    return noise / noise.std(dim=(1, 2, 3), keepdim=True)


def is_edm_scheduler(scheduler: Any) -> bool:
    """Whether the base was trained with EDM's preconditioning, as Playground v2.5 was."""
    return hasattr(scheduler, "precondition_outputs")


def _perturbed_noise(batch: Batch, noise: Tensor) -> Tensor:
    """Return the noise in the model's input."""
    return noise if batch.input_perturbation is None else noise + batch.input_perturbation


def _forward(model: nn.Module, sample: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
    prompts, time_ids = batch.prompts, batch.geometry["add_time_ids"]
    if "input_ids" in prompts:
        output: Tensor = model(sample, timesteps, prompts["input_ids"], prompts["caption_mask"], time_ids)
        return output
    added = {"text_embeds": prompts["pooled_prompt_embeds"], "time_ids": time_ids}
    embeds = prompts["prompt_embeds"]
    output = model(sample.to(embeds.dtype), timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]
    return output


def _target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"unknown prediction_type {scheduler.config.prediction_type!r} in the base's scheduler")


def _weights(objective: SdxlObjective, timesteps: Tensor) -> Tensor | None:
    """Return the loss weight of each image's timestep, (B,).

    Min-SNR (arXiv:2303.09556): min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity. Debiased estimation
    (arXiv:2310.08442): 1 / sqrt(SNR) for noise and, as in sd-scripts, 1 / (SNR + 1) for velocity.
    """
    scheduler, gamma = objective.scheduler, objective.snr_gamma
    if gamma is None and not objective.debiased:
        return None
    snr, is_noise = compute_snr(scheduler, timesteps), scheduler.config.prediction_type == "epsilon"
    if gamma is not None:
        return snr.clamp(max=gamma) / (snr if is_noise else snr + 1)
    snr = snr.clamp(max=MAX_DEBIASED_SNR)
    return snr.rsqrt() if is_noise else 1 / (snr + 1)


def _edm_prediction_target_weights(
    model: nn.Module, scheduler: Any, batch: Batch, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (denoised latents, clean latents, weights (B,)) at x + sigma * noise."""
    if is_edm_scheduler(scheduler):
        indices = timesteps.cpu()
        sigma = scheduler.sigmas[indices].to(noise).view(-1, 1, 1, 1)
        noisy = batch.latents + sigma * _perturbed_noise(batch, noise)
        times = scheduler.timesteps[indices].to(noise)
        output = _forward(model, scheduler.precondition_inputs(noisy, sigma), times, batch)
        prediction = scheduler.precondition_outputs(noisy, output.float(), sigma)
        data = scheduler.config.sigma_data
        weights = (sigma**2 + data**2) / (sigma * data) ** 2
        return prediction, batch.latents, weights.flatten()
    signal = scheduler.alphas_cumprod.to(noise)[timesteps].view(-1, 1, 1, 1)
    sigma = ((1 - signal) / signal).sqrt()
    noisy = batch.latents + sigma * _perturbed_noise(batch, noise)
    scale = (sigma**2 + 1).sqrt()
    output = _forward(model, noisy / scale, timesteps, batch).float()
    if scheduler.config.prediction_type == "epsilon":
        prediction = noisy - sigma * output
    else:
        prediction = noisy / scale**2 - output * sigma / scale
    return prediction, batch.latents, sigma.flatten() ** -2
