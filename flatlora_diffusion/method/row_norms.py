"""Squared row norms of the merged weights W' = W + sBA, and the standard deviations of the noise from them.

BA is not formed. For a layer with m filters of n inputs, A (R, n) and B (m, R):

    ||W'_i||^2 = ||W_i||^2 + 2s B_i (A W_i^T) + s^2 B_i (A A^T) B_i^T

Only the product with W is computed layer by layer. The other operations are small and a model has hundreds of layers,
so layers of the same shape are batched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flatlora_diffusion.config import NoiseKind
from flatlora_diffusion.method.layers import AdaptedLayer

FREE = 2**20  # bytes that the stacked factors may always take, so that small layers are batched

Group = tuple[list[AdaptedLayer], Tensor]  # L layers of one shape and their ||W'_i||^2, (L, m) fp32


@dataclass(frozen=True)
class RowStds:
    """The standard deviations of Eq. 7 at sigma 1 of all rows of `layers`, which are on one device: (rows,) fp32."""

    layers: list[AdaptedLayer]
    stds: Tensor

    @property
    def rows(self) -> list[int]:
        return [layer.shape[0] for layer in self.layers]

    def times(self, sigma: float) -> dict[str, Tensor]:
        """Return the standard deviations at `sigma` by layer name, (m,) each."""
        return dict(zip((layer.name for layer in self.layers), (self.stds * sigma).split(self.rows), strict=True))


@dataclass(frozen=True)
class NormState:
    """The standard deviations at sigma 1 of all rows of all layers, (rows,) fp32, in `interval` = step // every."""

    interval: int
    stds: Tensor


class RowStdCache:
    """Caches the standard deviations of `layers` for intervals of `every` optimizer steps."""

    def __init__(self, layers: Mapping[str, AdaptedLayer], every: int, kind: NoiseKind) -> None:
        self._layers, self._every, self._kind = layers, every, kind
        self._interval: int | None = None
        self._cached: list[RowStds] = []
        self._is_frozen = False

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """Compute them once per step while open, even with `every` = 1."""
        self._is_frozen = True
        try:
            yield
        finally:
            self._is_frozen = False
            if self._every == 1:
                self._interval, self._cached = None, []

    def get(self, step: int) -> list[RowStds]:
        """Return those of optimizer step `step` and cache them for its interval."""
        stds = self.peek(step, self._layers.values())
        if self._every > 1 or self._is_frozen:
            self._interval, self._cached = step // self._every, stds
        return stds

    def peek(self, step: int, layers: Collection[AdaptedLayer]) -> list[RowStds]:
        """Return those of `step`, of `layers` at least, without caching them."""
        return self._cached if self._interval == step // self._every else _compute_stds(layers, self._kind)

    @property
    def nbytes(self) -> int:
        return sum(group.stds.nbytes for group in self._cached)

    def state(self) -> NormState | None:
        """Return the cached values for a checkpoint inside an interval; None if there are none."""
        if self._interval is None:
            return None
        rows = {name: stds for group in self._cached for name, stds in group.times(1).items()}
        device = next(iter(rows.values())).device
        return NormState(self._interval, torch.cat([rows[name].to(device) for name in self._layers]))

    def load(self, state: NormState) -> None:
        layers = self._layers.values()
        rows = state.stds.split([layer.shape[0] for layer in layers])
        stds = {layer.name: std.to(layer.base.weight.device) for layer, std in zip(layers, rows, strict=True)}
        self._interval, self._cached = state.interval, _by_device(layers, stds)


def _compute_stds(layers: Collection[AdaptedLayer], kind: NoiseKind) -> list[RowStds]:
    stds: dict[str, Tensor] = {}
    for group, square_norms in merged_square_norms(layers):
        group_stds = row_stds(square_norms, group[0].inputs, 1.0, kind).unbind()
        stds.update((layer.name, std) for layer, std in zip(group, group_stds, strict=True))
    return _by_device(layers, stds)


def _by_device(layers: Iterable[AdaptedLayer], stds: Mapping[str, Tensor]) -> list[RowStds]:
    """Concatenate `stds` by device, in the order of `layers`."""
    members: dict[torch.device, list[AdaptedLayer]] = {}
    for layer in layers:
        members.setdefault(stds[layer.name].device, []).append(layer)
    return [RowStds(group, torch.cat([stds[layer.name] for layer in group])) for group in members.values()]


def merged_square_norms(layers: Iterable[AdaptedLayer]) -> Iterator[Group]:
    """Yield groups of L layers of the same shape with their ||W'_i||^2, (L, m) fp32."""
    for group in _groups(layers):
        is_merged = group[0].tuner.merged  # W already contains sBA
        yield group, group[0].square_norms().unsqueeze(0) if is_merged else _square_norms(group)


def row_stds(square_norms: Tensor, inputs: int, sigma: float, kind: NoiseKind) -> Tensor:
    """Return Eq. 7's standard deviation sigma / sqrt(n) * ||W'_i|| of the noise of each row.

    Args:
        square_norms: ||W'_i||^2, (..., m).
        inputs: n.
        sigma: relative radius of the noise.
        kind: `iid` noise has the same standard deviation in all rows of a layer, at equal energy.
    """
    if kind == "iid":
        square_norms = square_norms.mean(dim=-1, keepdim=True).expand_as(square_norms)
    return square_norms.mul(sigma**2 / inputs).sqrt_()


def _groups(layers: Iterable[AdaptedLayer]) -> Iterator[list[AdaptedLayer]]:
    """Yield layers whose norms are computed together; a merged layer is alone."""
    alike: dict[object, list[AdaptedLayer]] = {}
    for layer in layers:
        if layer.tuner.merged:
            yield [layer]
        else:
            alike.setdefault((layer.shape, layer.rank, layer.scale, layer.base.weight.device), []).append(layer)
    for members in alike.values():
        size = _batch_size(members[0])
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _batch_size(layer: AdaptedLayer) -> int:
    """Return how many such layers fit into `FREE` bytes or the memory of the eps of one of them."""
    filters = layer.shape[0]
    stacked = layer.rank * (layer.inputs + 3 * filters)  # A, B, W A^T and 2 W A^T + s B A A^T
    return max(1, max(filters * layer.inputs, FREE // 4) // max(1, stacked))


def _square_norms(group: list[AdaptedLayer]) -> Tensor:
    downs, ups = zip(*[layer.factors() for layer in group], strict=True)
    down, up = torch.stack(downs), torch.stack(ups)  # (L, R, n) and (L, m, R)
    crossed = torch.empty_like(up)
    for layer, layer_down, out in zip(group, downs, crossed.unbind(), strict=True):
        layer.base_matmul(layer_down, out)
    base = torch.stack([layer.base_square_norms for layer in group]).to(up.device)  # (L, m)
    scale = group[0].scale
    mixed = torch.baddbmm(crossed, up, down @ down.mT, beta=2, alpha=scale)
    return base.add_(mixed.mul_(up).sum(dim=2), alpha=scale).clamp_(min=0)
