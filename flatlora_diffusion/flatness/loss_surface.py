"""The loss around W' along random directions that are scaled to each filter (Li et al. 2018, arXiv:1712.09913)."""

from __future__ import annotations

import torch

from flatlora_diffusion.flatness.functional import Loss, Weights, shifted, value
from flatlora_diffusion.method.noise import row_noise
from flatlora_diffusion.storage.rng import derive_seed


def axis(extent: float, points: int) -> list[float]:
    """`points` values from -extent to extent; the middle one of an odd number is exactly 0."""
    return [extent * (2 * index / (points - 1) - 1) for index in range(points)]


@torch.no_grad()
def direction(weights: Weights, seed: int, index: int) -> Weights:
    """A Gaussian direction, each row as long as that of W': d_i = ||W'_i|| z_i / ||z_i||.

    z is a function of (seed, layer, index), so all LoRAs share it. One unit moves each row by its own length.
    """
    directions = {}
    for name, weight in weights.items():
        ones = torch.ones(len(weight), device=weight.device)
        z = row_noise(ones, tuple(weight.shape), derive_seed(seed, "direction", name, index)).to(weight)
        length, drawn = (rows.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1)) for rows in (weight, z))
        directions[name] = z * (length / drawn)
    return directions


def loss_slice(loss: Loss, weights: Weights, at: list[float], seed: int, index: int) -> list[float]:
    """L(W' + a d) for each a of `at`, along direction `index`."""
    along = direction(weights, seed, index)
    return [value(loss, shifted(weights, along, a)) for a in at]


def loss_surface(loss: Loss, weights: Weights, at: list[float], seed: int) -> list[list[float]]:
    """L(W' + a d_0 + b d_1): a row for each b, a column for each a of `at`."""
    across, along = direction(weights, seed, 0), direction(weights, seed, 1)
    rows = []
    for b in at:
        base = shifted(weights, along, b)
        rows.append([value(loss, shifted(base, across, a)) for a in at])
    return rows
