"""The loss around the merged weights W': how much it rises on average under noise and in the steepest direction, and
along random directions.

The unit of the rises is that of Eq. 7 of Flat-LoRA (arXiv:2409.14396): a radius of 0.1 moves each row of W' by about
a tenth of its length. Only W' counts, not how it is split into W, A and B.
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
from flatlora_diffusion.flatness.loss_surface import axis, loss_slice, loss_surface

NOISES: tuple[NoiseKind, ...] = ("filter", "iid")


@dataclass(frozen=True)
class Landscape:
    """The loss around the W' of one model, whatever model it is.

    rises: by kind of noise, one for each sigma; slices: (direction, point); surface: (point along direction 1, point
    along direction 0).
    """

    name: str
    rises: dict[str, list[Estimate]]
    slices: list[list[float]]
    surface: list[list[float]]

    @property
    def loss(self) -> float:
        """At W' itself, in the middle of the surface."""
        middle = len(self.surface) // 2
        return self.surface[middle][middle]


def landscape(name: str, loss: Loss, weights: Weights, config: LandscapeConfig) -> Landscape:
    """The landscape of `loss` around `weights`; draws and directions are those of all that have `config`."""
    points, seed = axis(config.extent, config.surface_points), config.seed
    return Landscape(
        name=name,
        rises={
            kind: [expected_rise(loss, weights, sigma, config.rise_draws, seed, kind) for sigma in config.sigmas]
            for kind in NOISES
        },
        slices=[loss_slice(loss, weights, points, seed, index) for index in range(config.slice_directions)],
        surface=loss_surface(loss, weights, points, seed),
    )


def expected_rise(
    loss: Loss, weights: Weights, sigma: float, draws: int, seed: int, kind: NoiseKind = "filter"
) -> Estimate:
    """E[L(W' + eps)] - L(W') over `draws` common draws of eps, each taken with both signs.

    The two signs cancel the slope, which has no part in the mean, and with it most of the error.
    """
    scale = scales(weights, kind)
    clean = value(loss, weights)
    rises = []
    for draw in range(draws):
        eps = noise(scale, weights, seed, draw)
        both = [value(loss, shifted(weights, eps, sign * sigma)) for sign in (1, -1)]
        rises.append(sum(both) / 2 - clean)
    return Estimate(tuple(rises))


def worst_rises(loss: Loss, weights: Weights, radii: Sequence[float]) -> list[float]:
    """The rise after one step of steepest ascent of each radius, as SAM takes it (arXiv:2010.01412).

    The step lies where noise of sigma = radius lies, so it compares with `expected_rise`: in units of `filter` it has
    the length radius * sqrt(N). With u = eps / S it is u = radius * sqrt(N) * S g / ||S g||; the rescaling by the
    filters' norms is that of ASAM (arXiv:2102.11600). `weights` may be any matrices that the loss is a function of: of
    A and B each row moves by about as much of its own length as a row of W' does.
    """
    scale = scales(weights, "filter")
    clean = value(loss, weights)
    steepest = {name: scale[name] * slope for name, slope in gradient(loss, weights).items()}
    length = torch.stack([part.double().square().sum() for part in steepest.values()]).sum().sqrt()
    if length == 0:
        return [0.0 for _ in radii]
    unit = float(size(weights) ** 0.5 / length)
    step = {name: scale[name] * part * unit for name, part in steepest.items()}
    return [value(loss, shifted(weights, step, radius)) - clean for radius in radii]
