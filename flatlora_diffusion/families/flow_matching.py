"""The objective of flow matching: the velocity of rectified flow, x_t = (1 - s) x + s n at noise level s."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor, nn

from flatlora_diffusion.config import LossType, ObjectiveConfig, WeightingScheme
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.objective import Objective, timestep_range


@dataclass(frozen=True, eq=False)
class FlowMatching(Objective):
    """The noise levels, their distribution and their weights.

    A timestep is a noise level s in (0, 1], fp32.

    levels: the noise levels of training, (T,), rising; the last is pure noise.
    mean, std, scale: parameters of the weightings `logit_normal` and `mode`.
    indices: first and last of `levels` that are drawn.
    """

    levels: Tensor
    weighting: WeightingScheme = "none"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    loss_type: LossType = "l2"
    indices: tuple[int, int | None] = (0, None)

    @classmethod
    def of(cls, config: ObjectiveConfig, levels: Tensor) -> Self:
        """Create the objective of a base with these levels. Raises ConfigError for an empty range of timesteps."""
        return cls(
            levels,
            weighting=config.weighting_scheme,
            mean=config.logit_mean,
            std=config.logit_std,
            scale=config.mode_scale,
            loss_type=config.loss_type,
            indices=timestep_range(config, len(levels) - 1),
        )

    def unweighted(self) -> Self:
        return type(self)(self.levels)

    @abstractmethod
    def velocity(self, model: nn.Module, noisy: Tensor, levels: Tensor, batch: Batch) -> Tensor:
        """Predict the velocity, (B, C, h, w), at noisy latents of that shape with noise levels (B,)."""

    def draw(self, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample noise, and noise levels by `weighting`: uniform, logit-normal or mode (arXiv:2403.03206, 3.1).

        Fewer levels are drawn by the same density, compressed to them.
        """
        noise = torch.randn(latents.shape, generator=rng, device=latents.device, dtype=torch.float32)
        density = compute_density_for_timestep_sampling(
            self.weighting,
            latents.shape[0],
            logit_mean=self.mean,
            logit_std=self.std,
            mode_scale=self.scale,
            device=latents.device,
            generator=rng,
        )
        first, last = self.indices
        last = len(self.levels) - 1 if last is None else last
        count = last - first + 1
        # The density is over schedules that begin with pure noise. It can round to 1, one past the last.
        steps = (density * count).long().clamp(max=count - 1)
        return noise, self.levels.to(latents.device)[last - steps]

    def compared(
        self, model: nn.Module, batch: Batch, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the predicted velocity, noise - latents, and the weights of the noise levels."""
        level = timesteps.view(-1, 1, 1, 1)
        noisy = (1.0 - level) * batch.latents + level * noise
        is_weighted = self.weighting in ("sigma_sqrt", "cosmap")
        weights = compute_loss_weighting_for_sd3(self.weighting, timesteps) if is_weighted else None
        return self.velocity(model, noisy, timesteps, batch), noise - batch.latents, weights


def noise_levels(scheduler: FlowMatchEulerDiscreteScheduler) -> Tensor:
    """Return the noise levels that a base with this scheduler is trained on, rising, (T,) fp32.

    They have the shift of the scheduler, unless it depends on the image size, which applies to sampling only.
    """
    # A new scheduler, because sampling changes the levels of the pipeline's.
    levels: Tensor = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config).sigmas
    return levels.flip(0)
