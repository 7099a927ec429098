"""Squared filter norms of the merged weights W' = W + sBA, many layers at a time; the noise's size that they give.

BA is not formed. For a layer with m filters of n inputs, A (R, n) and B (m, R):

    ||W'_i||^2 = ||W_i||^2 + 2s B_i (A W_i^T) + s^2 B_i (A A^T) B_i^T

Only the product with W is taken layer by layer. The rest is a dozen small operations, and a model has hundreds of
layers, so those of one shape share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flatlora_diffusion.config import NoiseKind
from flatlora_diffusion.method.adapted_layers import AdaptedLayer


def merged_square_norms(layers: Iterable[AdaptedLayer]) -> Iterator[tuple[list[AdaptedLayer], Tensor]]:
    """Groups of L `layers` of one shape, each group with its ||W'_i||^2: (L, m), fp32."""
    alike: dict[object, list[AdaptedLayer]] = {}
    for layer in layers:
        if layer.tuner.merged:
            yield [layer], layer.square_norms().unsqueeze(0)  # W holds sBA already
        else:
            alike.setdefault((layer.shape, layer.rank, layer.scale, layer.base.weight.device), []).append(layer)
    for members in alike.values():
        size = _at_once(members[0])
        for start in range(0, len(members), size):
            group = members[start : start + size]
            yield group, _square_norms(group)


def row_stds(square_norms: Tensor, inputs: int, sigma: float, kind: NoiseKind) -> Tensor:
    """Eq. 7: the standard deviation sigma / sqrt(n) * ||W'_i|| of each row's noise, (..., m) from ||W'_i||^2 (..., m).

    `iid` noise has one standard deviation for all rows of a layer, at equal energy.
    """
    if kind == "iid":
        square_norms = square_norms.mean(dim=-1, keepdim=True).expand_as(square_norms)
    return square_norms.mul(sigma**2 / inputs).sqrt_()


def _at_once(layer: AdaptedLayer) -> int:
    """How many layers like this one fit, with all that is stacked of them, into the memory of one layer's eps."""
    filters = layer.shape[0]
    stacked = layer.rank * (layer.inputs + 3 * filters)  # A, B, W A^T and 2 W A^T + s B A A^T
    return max(1, filters * layer.inputs // max(1, stacked))


def _square_norms(group: list[AdaptedLayer]) -> Tensor:
    factors = [layer.factors() for layer in group]
    down = torch.stack([down for down, _ in factors])  # (L, R, n)
    up = torch.stack([up for _, up in factors])  # (L, m, R)
    crossed = torch.stack([layer.weight_times(down) for layer, (down, _) in zip(group, factors, strict=True)])
    base = torch.stack([layer.base_square_norms.to(up.device) for layer in group])  # (L, m)
    scale = group[0].scale
    mixed = torch.baddbmm(crossed, up, down @ down.mT, beta=2, alpha=scale)
    return base.add_(mixed.mul_(up).sum(dim=2), alpha=scale).clamp_(min=0)
