"""Curvature of the loss at W' from Hessian-vector products: top eigenvalues by Lanczos, the trace by Hutchinson.

In the metric `filter` it is S H S with S = diag(||W'_i|| / sqrt(n)), which is invariant to rescaling of layers; for a
small sigma, half its trace times sigma^2 is the loss increase under noise of Eq. 7. In the metric `raw` it is H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatlora_diffusion.flatness.functional import Estimate, Loss, Metric, Weights, hessian_vector, scales, size
from flatlora_diffusion.storage.rng import generator

_EXHAUSTED = 1e-6  # relative to the largest Ritz value: the rest of the space is rounding noise


@dataclass(frozen=True)
class Eigenvalue:
    """An approximate eigenvalue; an exact one is within the residual ||H v - value v|| of its Ritz vector."""

    value: float
    residual: float


def top_eigenvalues(
    loss: Loss, weights: Weights, metric: Metric, count: int, iterations: int, seed: int
) -> list[Eigenvalue]:
    """Return the `count` largest eigenvalues, largest first, by Lanczos with full reorthogonalization.

    `iterations` is the number of products H v; the basis, `iterations` times the size of W', is on the CPU.
    """
    multiply = _operator(loss, weights, metric)
    steps = min(iterations, size(weights))
    vector = _random(weights, seed, "lanczos", 0)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        vector = vector / vector.norm()
        basis.append(vector.cpu())
        product = multiply(vector)
        diagonal.append(float(product @ vector))
        for _ in range(2):  # twice is enough for orthogonality up to rounding
            for earlier in basis:
                earlier = earlier.to(product)
                product -= (product @ earlier) * earlier
        off_diagonal.append(float(product.norm()))
        values, vectors = _ritz(diagonal, off_diagonal[:-1])
        if len(basis) == steps or off_diagonal[-1] <= _EXHAUSTED * float(values.abs().max()):
            break
        vector = product
    residuals = (off_diagonal[-1] * vectors[-1].abs()).tolist()
    return [Eigenvalue(*pair) for pair in sorted(zip(values.tolist(), residuals, strict=True), reverse=True)[:count]]


def trace(loss: Loss, weights: Weights, metric: Metric, probes: int, seed: int) -> Estimate:
    """Return the trace from `probes` products z^T H z for random signs z, equal for all LoRAs."""
    multiply = _operator(loss, weights, metric)
    values = []
    for index in range(probes):
        signs = _random(weights, seed, "hutchinson", index).sign()
        values.append(float((signs.double() * multiply(signs)).sum()))
    return Estimate(tuple(values))


def _operator(loss: Loss, weights: Weights, metric: Metric) -> Callable[[Tensor], Tensor]:
    """Return the function v -> S H S v for flat vectors (N,)."""
    scale = scales(weights, metric)
    lengths = [weight.numel() for weight in weights.values()]

    def multiply(vector: Tensor) -> Tensor:
        parts = zip(weights.items(), vector.split(lengths), strict=True)
        scaled = {name: part.view_as(weight) * scale[name] for (name, weight), part in parts}
        product = hessian_vector(loss, weights, scaled)
        return torch.cat([(scale[name] * part).flatten() for name, part in product.items()])

    return multiply


def _random(weights: Weights, seed: int, purpose: str, index: int) -> Tensor:
    like = next(iter(weights.values()))
    rng = generator(like.device, seed, purpose, index)
    return torch.randn(size(weights), generator=rng, device=like.device, dtype=like.dtype)


def _ritz(diagonal: list[float], off_diagonal: list[float]) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of the symmetric tridiagonal matrix."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        off = torch.tensor(off_diagonal, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
