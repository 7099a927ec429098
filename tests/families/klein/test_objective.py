"""The training objective against formulas written by hand, and against diffusers' noise scheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import normal
from torch import Tensor, nn

from flatlora_diffusion.config import ConfigError, ObjectiveConfig
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.flow_matching import noise_levels
from flatlora_diffusion.families.klein.objective import KleinObjective
from flatlora_diffusion.families.objective import diffusion_loss, sample_losses

LEVELS = noise_levels(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))


class Recorder(nn.Module):
    """In place of a transformer: remembers what it was given and answers with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Any = None

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor]:
        self.given = {"hidden_states": hidden_states, **rest}
        return (torch.full_like(hidden_states, 0.5),)


def make_batch(**more: Tensor) -> Batch:
    return Batch(normal(1, 3, 16, 2, 4), {"prompt_embeds": normal(2, 3, 5, 24)}, {}, **more)


def levels_of(count: int, **settings: Any) -> Tensor:
    objective = KleinObjective.of(ObjectiveConfig(**settings), LEVELS)
    return objective.draw(torch.zeros(count, 1, 1, 1), torch.Generator().manual_seed(3))[1]


def test_the_loss_is_the_squared_error_of_the_velocity_at_a_straight_mixture() -> None:
    batch, model, noise = make_batch(), Recorder(), normal(3, 3, 16, 2, 4)
    levels = torch.tensor([0.001, 0.4, 1.0])
    losses = sample_losses(model, KleinObjective(LEVELS), batch, noise, levels)
    expected = (0.5 - (noise - batch.latents)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected)
    given, part = model.given, levels.view(3, 1, 1, 1)
    mixture = (1 - part) * batch.latents + part * noise
    tokens = torch.stack([mixture[:, :, row, column] for row in range(2) for column in range(4)], dim=1)
    torch.testing.assert_close(given["hidden_states"], tokens)
    torch.testing.assert_close(given["timestep"], levels)
    assert given["guidance"] is None
    assert torch.equal(given["encoder_hidden_states"], batch.prompts["prompt_embeds"])
    assert given["img_ids"].tolist() == [[0, row, column, 0] for row in range(2) for column in range(4)]
    assert given["txt_ids"].tolist() == [[0, 0, 0, index] for index in range(5)]


def test_noise_levels_are_those_of_the_scheduler_before_any_sampling() -> None:
    torch.testing.assert_close(LEVELS, torch.arange(1, 1001) / 1000)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = scheduler.sigmas.flip(0)
    scheduler.set_timesteps(7)
    assert torch.equal(noise_levels(scheduler), expected)
    plain = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(expected, 3 * plain / (1 + 2 * plain))


def test_draws_are_standard_normal_and_uniform_and_a_function_of_the_generator() -> None:
    objective, latents = KleinObjective(LEVELS), torch.zeros(4000, 1, 2, 2)
    noise, levels = objective.draw(latents, torch.Generator().manual_seed(2))
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    counts = torch.histc(levels, 10, 0, 1)
    assert float((counts - 400).abs().max()) < 4 * 19  # binomial: 4 standard deviations
    again = objective.draw(latents, torch.Generator().manual_seed(2))
    assert torch.equal(noise, again[0])
    assert torch.equal(levels, again[1])


def test_logit_normal_levels_have_its_median_and_spread() -> None:
    levels = levels_of(4000, weighting_scheme="logit_normal", logit_mean=0.5, logit_std=0.8)
    logits = torch.logit(1 - levels + 0.0005)  # the density counts from pure noise, in steps of a thousandth
    assert abs(float(logits.median()) - 0.5) < 0.06
    assert abs(float(logits.std()) - 0.8) < 0.05


def test_mode_levels_have_its_density() -> None:
    """By its distribution function: the share of levels below that of a uniform u is 1 - u, or u."""
    scale = 1.29
    levels = levels_of(4000, weighting_scheme="mode", mode_scale=scale)
    for u in (0.2, 0.5, 0.8):
        density = 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        share = float((1 - levels < density).float().mean())
        assert abs(share - (1 - u)) < 0.035


def test_weightings_of_the_loss_have_their_formulas() -> None:
    batch, noise = make_batch(), normal(3, 3, 16, 2, 4)
    levels = torch.tensor([0.1, 0.5, 0.9])
    plain = sample_losses(Recorder(), KleinObjective(LEVELS), batch, noise, levels)
    for scheme, weights in (
        ("sigma_sqrt", levels**-2),
        ("cosmap", 2 / (math.pi * (1 - 2 * levels + 2 * levels**2))),
        ("logit_normal", torch.ones(3)),
        ("mode", torch.ones(3)),
    ):
        objective = KleinObjective.of(ObjectiveConfig(weighting_scheme=scheme), LEVELS)  # type: ignore[arg-type]
        torch.testing.assert_close(sample_losses(Recorder(), objective, batch, noise, levels), plain * weights)
        assert torch.equal(sample_losses(Recorder(), objective.unweighted(), batch, noise, levels), plain)


def test_a_range_of_timesteps_counts_from_the_cleanest() -> None:
    levels = levels_of(500, min_timestep=100, max_timestep=299)
    assert float(levels.min()) == pytest.approx(0.101)
    assert float(levels.max()) == pytest.approx(0.3)
    assert float(levels_of(50, min_timestep=999).min()) == 1.0


def test_masks_and_weights_of_images_change_the_mean() -> None:
    mask = torch.zeros(3, 1, 2, 4)
    mask[0, :, 0], mask[1] = 1.0, 0.5
    weights = torch.tensor([2.0, 0.0, 6.0])
    batch, noise = make_batch(mask=mask, weights=weights), normal(3, 3, 16, 2, 4)
    levels = torch.tensor([0.1, 0.5, 0.9])
    errors = (0.5 - (noise - batch.latents)).square()
    expected = torch.stack([errors[0, :, 0].mean(), errors[1].mean(), torch.tensor(0.0)])
    losses = sample_losses(Recorder(), KleinObjective(LEVELS), batch, noise, levels)
    torch.testing.assert_close(losses, expected)
    loss = diffusion_loss(Recorder(), KleinObjective(LEVELS), batch, noise, levels)
    torch.testing.assert_close(loss, (losses * weights).mean())


def test_an_empty_range_of_timesteps_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_timestep=5 and max_timestep=4"):
        KleinObjective.of(ObjectiveConfig(min_timestep=5, max_timestep=4), LEVELS)
