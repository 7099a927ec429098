"""FLUX.2 klein's objective: the velocity of rectified flow, x_t = (1 - s) x + s n at noise level s."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor, nn

from flatlora_diffusion.config import LossType, ObjectiveConfig, WeightingScheme
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.klein.latents import (
    from_tokens,
    image_positions,
    text_positions,
    to_tokens,
)
from flatlora_diffusion.families.objective import Objective, timestep_range

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class KleinObjective(Objective):
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

    def unweighted(self) -> KleinObjective:
        return KleinObjective(self.levels)

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
        prediction = velocity(model, noisy, timesteps, batch.prompts["prompt_embeds"], len(self.levels))
        is_weighted = self.weighting in ("sigma_sqrt", "cosmap")
        weights = compute_loss_weighting_for_sd3(self.weighting, timesteps) if is_weighted else None
        return prediction, noise - batch.latents, weights


def objective_of(config: ObjectiveConfig, levels: Tensor) -> KleinObjective:
    """Create the objective for a base with these noise levels. Raises ConfigError for an empty range of timesteps."""
    return KleinObjective(
        levels,
        weighting=config.weighting_scheme,
        mean=config.logit_mean,
        std=config.logit_std,
        scale=config.mode_scale,
        loss_type=config.loss_type,
        indices=timestep_range(config, len(levels) - 1),
    )


def noise_levels(scheduler: FlowMatchEulerDiscreteScheduler) -> Tensor:
    """Return the noise levels that a base with this scheduler is trained on, rising, (T,) fp32.

    They have the shift of the scheduler, unless it depends on the image size, which applies to sampling only.
    """
    # A new scheduler, because sampling changes the levels of the pipeline's.
    levels: Tensor = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config).sigmas
    return levels.flip(0)


def velocity(model: nn.Module, latents: Tensor, levels: Tensor, prompt_embeds: Tensor, count: int = 1000) -> Tensor:
    """Predict the velocity at noisy latents (B, 4C, h, w) with noise levels (B,); `count` is that of training."""
    height, width = latents.shape[-2:]
    device, dtype = latents.device, prompt_embeds.dtype
    # With latents in half precision the model would round the timesteps too.
    is_half = dtype in _HALF and device.type != "meta"
    with torch.autocast(device.type, dtype) if is_half else nullcontext():
        tokens = model(
            hidden_states=to_tokens(latents),
            timestep=levels * count / 1000,
            guidance=None,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_positions(prompt_embeds.shape[1], device),
            img_ids=image_positions(height, width, device),
            return_dict=False,
        )[0]
    return from_tokens(tokens, height, width)


class Velocity(nn.Module):
    """The transformer as a function of noisy latents, noise levels and prompt embeddings."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, levels: Tensor, prompt_embeds: Tensor) -> Tensor:
        return velocity(self.transformer, latents, levels, prompt_embeds)
