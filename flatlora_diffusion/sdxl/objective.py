"""The training objective: tensors in, a scalar out. Noise and timesteps are arguments: the loss is deterministic."""

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

HUBER_DELTA = 0.1  # errors above it count linearly
MOST_DEBIASED_SNR = 1000.0  # where there is hardly any noise, debiased weights fall no further, as in sd-scripts


@dataclass(frozen=True)
class Batch:
    """The model's inputs for B images, and how much each image counts.

    latents (B, 4, h, w) fp32, add_time_ids (B, 6). The prompts: prompt_embeds (B, 77, D) and pooled_prompt_embeds
    (B, P); or, for a `Denoiser` that trains its text encoders, input_ids (B, 2, 77) and kept (B,), 0 where the caption
    is dropped. weights (B,) are each image's factor in the mean; mask (B, 1, h, w) in [0, 1] says which latent pixels
    count; None means all alike. more_noise (B, 4, h, w) is added to the noise that the model sees, not to what it has
    to predict.
    """

    latents: Tensor
    prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor | None
    add_time_ids: Tensor
    input_ids: Tensor | None = None
    kept: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    more_noise: Tensor | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `change` applied to each of its tensors."""
        changed: dict[str, Any] = {
            name: value if value is None else change(value) for name, value in vars(self).items()
        }
        return Batch(**changed)


@dataclass(frozen=True)
class Objective:
    """How noisy latents are made and what is compared with what.

    `scheduler` is a DDPMScheduler, or an EDM scheduler of diffusers; `edm` compares denoised latents, weighted, as in
    arXiv:2206.00364, in place of noise or velocity.
    """

    scheduler: Any
    edm: bool = False
    loss_type: LossType = "l2"
    snr_gamma: float | None = None
    debiased: bool = False
    noise_offset: float = 0.0
    multires: tuple[int, float] = (0, 0.0)  # coarser noises, and how much each counts of the last
    more_noise: float = 0.0
    timesteps: tuple[int, int | None] = (0, None)  # the first and the last that are drawn


def objective_of(config: ObjectiveConfig, scheduler: Any) -> Objective:
    """The objective that `config` sets for a base with `scheduler`.

    Raises ConfigError for a weighting or a kind of noise that does not fit the base.
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
            f"min_timestep={low} and max_timestep={high} leave no timestep: they must be in their order, and at most "
            f"{last} for this base"
        )
    return Objective(
        scheduler,
        edm=config.do_edm_style_training or is_edm_scheduler(scheduler),
        loss_type=config.loss_type,
        snr_gamma=config.snr_gamma,
        debiased=config.debiased_estimation,
        noise_offset=config.noise_offset,
        multires=(config.multires_noise_iterations, config.multires_noise_discount),
        more_noise=config.ip_noise_gamma,
        timesteps=(low, high),
    )


def unweighted(objective: Objective) -> Objective:
    """The plain squared error of what `objective` compares: losses of all runs with it can be compared."""
    return Objective(objective.scheduler, edm=objective.edm)


def draw_targets(objective: Objective, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise of the latents' shape and one uniform timestep (an index) per image, from `rng` alone."""
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


def with_more_noise(objective: Objective, batch: Batch, rng: torch.Generator) -> Batch:
    """`batch` with input perturbation (arXiv:2301.11706) drawn from `rng`; as it is where there is none."""
    if not objective.more_noise:
        return batch
    drawn = torch.randn(batch.latents.shape, generator=rng, device=batch.latents.device)
    return replace(batch, more_noise=objective.more_noise * drawn)


def _multires(noise: Tensor, levels: int, discount: float, rng: torch.Generator) -> Tensor:
    """`noise` and coarser noises of half the size each, down to one pixel, at std 1 for each image."""
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
    """The mean of the images' losses, each times its weight: a scalar in fp32. `target` as in `sample_losses`."""
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
    """The loss of each image, (B,) fp32. `model` is a UNet, or a `Denoiser` for a batch of token ids.

    A `target`, of the shape of the latents, takes the place of what the images ask for.
    """
    prediction, asked, weights = _compared(model, objective, batch, noise, timesteps)
    target = asked if target is None else target
    if objective.loss_type == "l2":
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    else:  # twice PyTorch's huber loss, so that small errors count as in l2
        errors = 2 * F.huber_loss(prediction.float(), target.float(), reduction="none", delta=HUBER_DELTA)
    losses = errors.mean(dim=(1, 2, 3)) if batch.mask is None else _masked_mean(errors, batch.mask)
    return losses if weights is None else losses * weights


def predicted(model: nn.Module, objective: Objective, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What `model` predicts where `sample_losses` compares: noise or velocity, or with `edm` denoised latents."""
    return _compared(model, objective, batch, noise, timesteps)[0]


def _compared(
    model: nn.Module, objective: Objective, batch: Batch, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(prediction, target, weights (B,)); without weights all count alike."""
    scheduler = objective.scheduler
    if objective.edm:
        return _denoised(model, scheduler, batch, noise, timesteps)
    noisy = scheduler.add_noise(batch.latents, _seen(batch, noise), timesteps)
    prediction = _predict(model, noisy, timesteps, batch)
    return prediction, _target(scheduler, batch.latents, noise, timesteps), _weights(objective, timesteps)


def is_edm_scheduler(scheduler: Any) -> bool:
    """Whether the base was trained with EDM's own preconditioning (such as Playground v2.5)."""
    return hasattr(scheduler, "precondition_outputs")


def _seen(batch: Batch, noise: Tensor) -> Tensor:
    """The noise of what the model sees."""
    return noise if batch.more_noise is None else noise + batch.more_noise


def _predict(model: nn.Module, sample: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
    if batch.input_ids is not None:
        output: Tensor = model(sample, timesteps, batch.input_ids, batch.kept, batch.add_time_ids)
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
    """The weight of each image's timestep, (B,).

    Min-SNR (arXiv:2303.09556): min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity. Debiased estimation
    (arXiv:2310.08442): 1 / sqrt(SNR) for noise and, as sd-scripts has it, 1 / (SNR + 1) for velocity.
    """
    scheduler, gamma = objective.scheduler, objective.snr_gamma
    if gamma is None and not objective.debiased:
        return None
    snr, is_noise = compute_snr(scheduler, timesteps), scheduler.config.prediction_type == "epsilon"
    if gamma is not None:
        return snr.clamp(max=gamma) / (snr if is_noise else snr + 1)
    snr = snr.clamp(max=MOST_DEBIASED_SNR)
    return snr.rsqrt() if is_noise else 1 / (snr + 1)


def _denoised(
    model: nn.Module, scheduler: Any, batch: Batch, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(denoised latents, clean latents, weights (B,)) at x + sigma * noise."""
    if is_edm_scheduler(scheduler):
        indices = timesteps.cpu()
        sigma = scheduler.sigmas[indices].to(noise).view(-1, 1, 1, 1)
        noisy = batch.latents + sigma * _seen(batch, noise)
        times = scheduler.timesteps[indices].to(noise)
        output = _predict(model, scheduler.precondition_inputs(noisy, sigma), times, batch)
        prediction = scheduler.precondition_outputs(noisy, output.float(), sigma)
        data = scheduler.config.sigma_data
        weights = (sigma**2 + data**2) / (sigma * data) ** 2
        return prediction, batch.latents, weights.flatten()
    signal = scheduler.alphas_cumprod.to(noise)[timesteps].view(-1, 1, 1, 1)
    sigma = ((1 - signal) / signal).sqrt()
    noisy = batch.latents + sigma * _seen(batch, noise)
    scale = (sigma**2 + 1).sqrt()
    output = _predict(model, noisy / scale, timesteps, batch).float()
    if scheduler.config.prediction_type == "epsilon":
        prediction = noisy - sigma * output
    else:
        prediction = noisy / scale**2 - output * sigma / scale
    return prediction, batch.latents, sigma.flatten() ** -2


def _masked_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """The mean of (B, C, h, w) over the pixels that `mask` shows; an image without any counts nothing."""
    shown = (errors * mask).sum(dim=(1, 2, 3))
    return shown / (mask.sum(dim=(1, 2, 3)) * errors.shape[1]).clamp(min=1e-6)
