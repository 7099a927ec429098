"""Squared filter norms of the merged weights W' = W + sBA, without forming BA and many layers at a time.

For a layer with m filters of n inputs, A (R, n) and B (m, R):

    ||W'_i||^2 = ||W_i||^2 + 2s B_i (A W_i^T) + s^2 B_i (A A^T) B_i^T

Only the product with W is taken layer by layer. The rest is a dozen small operations, and a model has hundreds of
layers, so those of one shape share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flatlora_diffusion.adapted_layers import AdaptedLayer, Factors

_TOGETHER = 16  # layers whose A and B are stacked: at rank 128 and SDXL's widest layers a copy of 31 MB


def merged_square_norms(layers: Iterable[AdaptedLayer]) -> Iterator[tuple[list[AdaptedLayer], Tensor]]:
    """Groups of L `layers` of one shape, each group with its ||W'_i||^2: (L, m), fp32."""
    alike: dict[object, list[tuple[AdaptedLayer, Factors]]] = {}
    for layer in layers:
        if layer.tuner.merged:
            yield [layer], layer.square_norms().unsqueeze(0)  # W holds sBA already
            continue
        factors = layer.factors()
        key = (layer.shape, factors.down.shape, factors.scale, factors.down.device)
        alike.setdefault(key, []).append((layer, factors))
    for members in alike.values():
        for start in range(0, len(members), _TOGETHER):
            group, factors_of = zip(*members[start : start + _TOGETHER], strict=True)
            yield list(group), _square_norms(group, factors_of)


def _square_norms(group: tuple[AdaptedLayer, ...], factors: tuple[Factors, ...]) -> Tensor:
    down = torch.stack([each.down for each in factors])  # (L, R, n)
    up = torch.stack([each.up for each in factors])  # (L, m, R)
    crossed = torch.stack([layer.weight_times(each.down) for layer, each in zip(group, factors, strict=True)])
    base = torch.stack([layer.base_square_norms for layer in group]).to(up.device)  # (L, m)
    scale = factors[0].scale
    mixed = torch.baddbmm(crossed, up, down @ down.mT, beta=2, alpha=scale)  # 2 W A^T + s B A A^T, (L, m, R)
    return base.add_(mixed.mul_(up).sum(dim=2), alpha=scale).clamp_(min=0)
