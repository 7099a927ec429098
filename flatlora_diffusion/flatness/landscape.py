"""The loss around the merged weights W': its increase under noise and in the steepest direction, and its values along
random directions, which are scaled to each filter (Li et al. 2018, arXiv:1712.09913).

Steps have the unit of Eq. 7 of Flat-LoRA (arXiv:2409.14396): a radius of 0.1 moves each row of W' by about a tenth of
its length. The results depend only on W', not on its split into W, A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flatlora_diffusion.config import LandscapeConfig, NoiseKind
from flatlora_diffusion.flatness.functional import (
    Estimate,
    Loss,
    Weights,
    gradient,
    noise,
    scales,
    shifted,
    size,
    value,
)
from flatlora_diffusion.method.noise import row_noise
from flatlora_diffusion.storage.rng import derive_seed

NOISES: tuple[NoiseKind, ...] = ("filter", "iid")


@dataclass(frozen=True)
class Landscape:
    """The loss around the W' of a model.

    rises: loss increases by kind of noise, one for each sigma; slices: (direction, point); surface: (point along
    direction 1, point along direction 0).
    """

    name: str
    rises: dict[str, list[Estimate]]
    slices: list[list[float]]
    surface: list[list[float]]

    @property
    def loss(self) -> float:
        """The loss at W', in the middle of the surface."""
        middle = len(self.surface) // 2
        return self.surface[middle][middle]


def landscape(name: str, loss: Loss, weights: Weights, config: LandscapeConfig) -> Landscape:
    """Measure the landscape of `loss` around `weights`; all models with the same `config` share random draws."""
    points, seed = axis(config.extent, config.surface_points), config.seed
    return Landscape(
        name=name,
        rises={
            kind: [expected_increase(loss, weights, sigma, config.rise_draws, seed, kind) for sigma in config.sigmas]
            for kind in NOISES
        },
        slices=[loss_slice(loss, weights, points, seed, index) for index in range(config.slice_directions)],
        surface=loss_surface(loss, weights, points, seed),
    )


def expected_increase(
    loss: Loss, weights: Weights, sigma: float, draws: int, seed: int, kind: NoiseKind = "filter"
) -> Estimate:
    """Estimate E[L(W' + eps)] - L(W') from `draws` antithetic draws of eps, equal for all models.

    Using both signs of eps cancels the gradient, which does not affect the mean but most of the error.
    """
    scale = scales(weights, kind)
    clean = value(loss, weights)
    increases = []
    for draw in range(draws):
        eps = noise(scale, weights, seed, draw)
        losses = [value(loss, shifted(weights, eps, sign * sigma)) for sign in (1, -1)]
        increases.append(sum(losses) / 2 - clean)
    return Estimate(tuple(increases))


def worst_increases(loss: Loss, weights: Weights, radii: Sequence[float]) -> list[float]:
    """Return the loss increase after one step of steepest ascent of each radius, as in SAM (arXiv:2010.01412).

    In units of `filter` the step has the length of noise with sigma = radius, so the increase is comparable with
    `expected_increase`. With u = eps / S it is u = radius * sqrt(N) * S g / ||S g||, the scaling of ASAM
    (arXiv:2102.11600). `weights` may be any matrices, such as A and B.
    """
    scale = scales(weights, "filter")
    clean = value(loss, weights)
    steepest = {name: scale[name] * grad for name, grad in gradient(loss, weights).items()}
    length = torch.stack([part.double().square().sum() for part in steepest.values()]).sum().sqrt()
    if length == 0:
        return [0.0 for _ in radii]
    unit = float(size(weights) ** 0.5 / length)
    step = {name: scale[name] * part * unit for name, part in steepest.items()}
    return [value(loss, shifted(weights, step, radius)) - clean for radius in radii]


def axis(extent: float, points: int) -> list[float]:
    """Return `points` values from -extent to extent; the middle of an odd number is exactly 0."""
    return [extent * (2 * index / (points - 1) - 1) for index in range(points)]


@torch.no_grad()
def direction(weights: Weights, seed: int, index: int) -> Weights:
    """Return a Gaussian direction whose rows have the length of those of W': d_i = ||W'_i|| z_i / ||z_i||.

    z is a function of (seed, layer, index), equal for all LoRAs.
    """
    directions = {}
    for name, weight in weights.items():
        ones = torch.ones(len(weight), device=weight.device)
        z = row_noise(ones, tuple(weight.shape), derive_seed(seed, "direction", name, index)).to(weight)
        length, z_length = (rows.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1)) for rows in (weight, z))
        directions[name] = z * (length / z_length)
    return directions


def loss_slice(loss: Loss, weights: Weights, at: list[float], seed: int, index: int) -> list[float]:
    """Return L(W' + a d) for each a in `at`, with d of `index`."""
    along = direction(weights, seed, index)
    return [value(loss, shifted(weights, along, a)) for a in at]


def loss_surface(loss: Loss, weights: Weights, at: list[float], seed: int) -> list[list[float]]:
    """Return L(W' + a d_0 + b d_1): a row for each b and a column for each a in `at`."""
    across, along = direction(weights, seed, 0), direction(weights, seed, 1)
    rows = []
    for b in at:
        base = shifted(weights, along, b)
        rows.append([value(loss, shifted(base, across, a)) for a in at])
    return rows
