"""The training objective, a deterministic function of latents, noise and timesteps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlora_diffusion.config import ConfigError, LossType, ObjectiveConfig
from flatlora_diffusion.families.batch import Batch

HUBER_DELTA = 0.1  # larger errors count linearly


class Objective(ABC):
    """The noise process and the loss of a family.

    A timestep is whatever the family's denoiser and noise process need: an index for SDXL, a noise level for flow
    matching. Callers only store, index and move them.

    Attributes:
        loss_type: how errors are measured.
    """

    loss_type: LossType

    @abstractmethod
    def draw(self, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample noise of the latents' shape, fp32, and a timestep per image, (B,), from `rng`."""

    @abstractmethod
    def compared(
        self, model: nn.Module, batch: Batch, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return prediction and target, both in the shape of the latents, and weights (B,) or None for 1."""

    @abstractmethod
    def unweighted(self) -> Objective:
        """Return the objective with the plain squared error, whose losses are comparable between runs."""

    def with_input_perturbation(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Return `batch` with input perturbation (arXiv:2301.11706) sampled from `rng`, if the objective has it."""
        return batch


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
        model: `Base.denoiser`, or `Base.trained_model` for a batch of token ids.
        noise: (B, C, h, w).
        timesteps: (B,).
        target: replaces the target that the images define, (B, C, h, w).
    """
    prediction, image_target, weights = objective.compared(model, batch, noise, timesteps)
    target = image_target if target is None else target
    if objective.loss_type == "l2":
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    else:  # twice PyTorch's huber loss, so that small errors equal l2
        errors = 2 * F.huber_loss(prediction.float(), target.float(), reduction="none", delta=HUBER_DELTA)
    losses = errors.mean(dim=(1, 2, 3)) if batch.mask is None else _masked_mean(errors, batch.mask)
    return losses if weights is None else losses * weights


def timestep_range(config: ObjectiveConfig, last: int) -> tuple[int, int]:
    """Return the first and the last timestep of the settings, for a base with timesteps 0 to `last`.

    Raises ConfigError for an empty range.
    """
    low, high = config.min_timestep, last if config.max_timestep is None else config.max_timestep
    if not low <= high <= last:
        raise ConfigError(
            f"min_timestep={low} and max_timestep={high} leave no timestep: min_timestep must not be larger than "
            f"max_timestep, and both at most {last} for this base"
        )
    return low, high


def predict(model: nn.Module, objective: Objective, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the prediction that `sample_losses` compares."""
    return objective.compared(model, batch, noise, timesteps)[0]


def _masked_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of errors (B, C, h, w) weighted by the mask, (B,); 0 for an empty mask."""
    total = (errors * mask).sum(dim=(1, 2, 3))
    return total / (mask.sum(dim=(1, 2, 3)) * errors.shape[1]).clamp(min=1e-6)
