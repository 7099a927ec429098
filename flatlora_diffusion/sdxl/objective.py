"""The training objective, a deterministic function of latents, noise and timesteps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from flatlora_diffusion.config import ConfigError, LossType, ObjectiveConfig

HUBER_DELTA = 0.1  # larger errors count linearly
MAX_DEBIASED_SNR = 1000.0  # as in sd-scripts


@dataclass(frozen=True)
class Batch:
    """The model's inputs for B images, and their loss weights.

    latents: (B, 4, h, w) fp32.
    prompt_embeds, pooled_prompt_embeds: (B, 77, D) and (B, P); None for a `Denoiser` that trains its text encoders.
    add_time_ids: (B, 6).
    input_ids, caption_mask: (B, 2, 77) and (B,), 0 where the caption is dropped; for such a `Denoiser`.
    weights: (B,), factors of the images in the mean; None for 1.
    mask: (B, 1, h, w) in [0, 1], the weights of latent pixels; None for 1.
    input_perturbation: (B, 4, h, w), added to the noise in the model's input but not to its target.
    """

    latents: Tensor
    prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor | None
    add_time_ids: Tensor
    input_ids: Tensor | None = None
    caption_mask: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    input_perturbation: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `function` applied to each tensor."""
        tensors: dict[str, Any] = {
            name: value if value is None else function(value) for name, value in vars(self).items()
        }
        return Batch(**tensors)


@dataclass(frozen=True)
class Objective:
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


def objective_of(config: ObjectiveConfig, scheduler: Any) -> Objective:
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
    last = scheduler.config.num_train_timesteps - 1
    low, high = config.min_timestep, last if config.max_timestep is None else config.max_timestep
    if not low <= high <= last:
        raise ConfigError(
            f"min_timestep={low} and max_timestep={high} leave no timestep: min_timestep must not be larger than "
            f"max_timestep, and both at most {last} for this base"
        )
    return Objective(
        scheduler,
        edm=config.do_edm_style_training or is_edm_scheduler(scheduler),
        loss_type=config.loss_type,
        snr_gamma=config.snr_gamma,
        debiased=config.debiased_estimation,
        noise_offset=config.noise_offset,
        multires=(config.multires_noise_iterations, config.multires_noise_discount),
        input_perturbation=config.ip_noise_gamma,
        timesteps=(low, high),
    )


def unweighted(objective: Objective) -> Objective:
    """Return the objective with the plain squared error, whose losses are comparable between runs."""
    return Objective(objective.scheduler, edm=objective.edm)


def sample_noise(objective: Objective, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample noise of the latents' shape and a uniform timestep (an index) per image from `rng`."""
    noise = torch.randn(latents.shape, generator=rng, device=latents.device, dtype=torch.float32)
    first, last = objective.timesteps
    end = objective.scheduler.config.num_train_timesteps if last is None else last + 1
    timesteps = torch.randint(first, end, (latents.shape[0],), generator=rng, device=latents.device)
    if objective.noise_offset:
        shape = (*latents.shape[:2], 1, 1)
        noise = noise + objective.noise_offset * torch.randn(shape, generator=rng, device=latents.device)
    if objective.multires[0]:
        noise = _multires(noise, *objective.multires, rng)
    return noise, timesteps


def with_input_perturbation(objective: Objective, batch: Batch, rng: torch.Generator) -> Batch:
    """Return `batch` with input perturbation (arXiv:2301.11706) sampled from `rng`, if the objective has it."""
    if not objective.input_perturbation:
        return batch
    noise = torch.randn(batch.latents.shape, generator=rng, device=batch.latents.device)
    return replace(batch, input_perturbation=objective.input_perturbation * noise)


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


def diffusion_loss(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    noise: Tensor,
    timesteps: Tensor,
    target: Tensor | None = None,
) -> Tensor:
    """Return the weighted mean of `sample_losses`, a scalar in fp32."""
    losses = sample_losses(model, objective, batch, noise, timesteps, target)
    return losses.mean() if batch.weights is None else (losses * batch.weights).mean()


def sample_losses(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    noise: Tensor,
    timesteps: Tensor,
    target: Tensor | None = None,
) -> Tensor:
    """Return the loss of each image, (B,) fp32.

    Args:
        model: a UNet, or a `Denoiser` for a batch of token ids.
        noise: (B, 4, h, w).
        timesteps: (B,), indices.
        target: replaces the target that the images define, (B, 4, h, w).
    """
    prediction, image_target, weights = _prediction_target_weights(model, objective, batch, noise, timesteps)
    target = image_target if target is None else target
    if objective.loss_type == "l2":
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    else:  # twice PyTorch's huber loss, so that small errors equal l2
        errors = 2 * F.huber_loss(prediction.float(), target.float(), reduction="none", delta=HUBER_DELTA)
    losses = errors.mean(dim=(1, 2, 3)) if batch.mask is None else _masked_mean(errors, batch.mask)
    return losses if weights is None else losses * weights


def predict(model: nn.Module, objective: Objective, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the prediction that `sample_losses` compares: noise or velocity, or with `edm` denoised latents."""
    return _prediction_target_weights(model, objective, batch, noise, timesteps)[0]


def _prediction_target_weights(
    model: nn.Module, objective: Objective, batch: Batch, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (prediction, target, weights (B,) or None)."""
    scheduler = objective.scheduler
    if objective.edm:
        return _edm_prediction_target_weights(model, scheduler, batch, noise, timesteps)
    noisy = scheduler.add_noise(batch.latents, _perturbed_noise(batch, noise), timesteps)
    prediction = _forward(model, noisy, timesteps, batch)
    return prediction, _target(scheduler, batch.latents, noise, timesteps), _weights(objective, timesteps)


def is_edm_scheduler(scheduler: Any) -> bool:
    """Whether the base was trained with EDM's preconditioning, as Playground v2.5 was."""
    return hasattr(scheduler, "precondition_outputs")


def _perturbed_noise(batch: Batch, noise: Tensor) -> Tensor:
    """Return the noise in the model's input."""
    return noise if batch.input_perturbation is None else noise + batch.input_perturbation


def _forward(model: nn.Module, sample: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
    if batch.input_ids is not None:
        output: Tensor = model(sample, timesteps, batch.input_ids, batch.caption_mask, batch.add_time_ids)
        return output
    assert batch.prompt_embeds is not None
    added = {"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.add_time_ids}
    dtype = batch.prompt_embeds.dtype
    output = model(sample.to(dtype), timesteps, batch.prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]
    return output


def _target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"unknown prediction_type {scheduler.config.prediction_type!r} in the base's scheduler")


def _weights(objective: Objective, timesteps: Tensor) -> Tensor | None:
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


def _masked_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of errors (B, C, h, w) weighted by the mask, (B,); 0 for an empty mask."""
    total = (errors * mask).sum(dim=(1, 2, 3))
    return total / (mask.sum(dim=(1, 2, 3)) * errors.shape[1]).clamp(min=1e-6)
