"""The curvature of the loss at W': top eigenvalues by Lanczos and the trace by Hutchinson, from products H v alone.

In the metric `filter` it is S H S with S = diag(||W'_i|| / sqrt(n)): blind to how layers are scaled, and half its
trace times sigma^2 is, for a small sigma, the rise that noise of Eq. 7 causes. In the metric `raw` it is H itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatlora_diffusion.flatness.functional import Estimate, Loss, Metric, Weights, hessian_vector, scales, size
from flatlora_diffusion.storage.rng import generator

_EXHAUSTED = 1e-6  # of the largest Ritz value: what is left of the space is noise of rounding


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue, and how far from it an exact one may be at most: ||H v - value v|| of its Ritz vector."""

    value: float
    residual: float


def top_eigenvalues(
    loss: Loss, weights: Weights, metric: Metric, count: int, iterations: int, seed: int
) -> list[Eigenvalue]:
    """The `count` largest eigenvalues, largest first, from `iterations` products H v.

    Lanczos with full reorthogonalization. The basis is kept on the CPU: it is `iterations` times as large as W'.
    """
    times = _operator(loss, weights, metric)
    steps = min(iterations, size(weights))
    vector = _random(weights, seed, "lanczos", 0)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        vector = vector / vector.norm()
        basis.append(vector.cpu())
        product = times(vector)
        diagonal.append(float(product @ vector))
        for _ in range(2):  # twice is enough to be orthogonal up to rounding
            for earlier in basis:
                earlier = earlier.to(product)
                product -= (product @ earlier) * earlier
        beside.append(float(product.norm()))
        values, vectors = _ritz(diagonal, beside[:-1])
        if len(basis) == steps or beside[-1] <= _EXHAUSTED * float(values.abs().max()):
            break
        vector = product
    residuals = (beside[-1] * vectors[-1].abs()).tolist()
    return [Eigenvalue(*pair) for pair in sorted(zip(values.tolist(), residuals, strict=True), reverse=True)[:count]]


def trace(loss: Loss, weights: Weights, metric: Metric, probes: int, seed: int) -> Estimate:
    """The trace from `probes` products: z^T H z for random signs z, common to all LoRAs."""
    times = _operator(loss, weights, metric)
    values = []
    for index in range(probes):
        signs = _random(weights, seed, "hutchinson", index).sign()
        values.append(float((signs.double() * times(signs)).sum()))
    return Estimate(tuple(values))


def _operator(loss: Loss, weights: Weights, metric: Metric) -> Callable[[Tensor], Tensor]:
    """v -> S H S v for flat vectors (N,)."""
    scale = scales(weights, metric)
    lengths = [weight.numel() for weight in weights.values()]

    def times(vector: Tensor) -> Tensor:
        parts = zip(weights.items(), vector.split(lengths), strict=True)
        scaled = {name: part.view_as(weight) * scale[name] for (name, weight), part in parts}
        product = hessian_vector(loss, weights, scaled)
        return torch.cat([(scale[name] * part).flatten() for name, part in product.items()])

    return times


def _random(weights: Weights, seed: int, purpose: str, index: int) -> Tensor:
    like = next(iter(weights.values()))
    rng = generator(like.device, seed, purpose, index)
    return torch.randn(size(weights), generator=rng, device=like.device, dtype=like.dtype)


def _ritz(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the tridiagonal matrix."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
