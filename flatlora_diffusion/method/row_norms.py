"""Squared filter norms of the merged weights W' = W + sBA, many layers at a time; the noise's size that they give.

BA is not formed. For a layer with m filters of n inputs, A (R, n) and B (m, R):

    ||W'_i||^2 = ||W_i||^2 + 2s B_i (A W_i^T) + s^2 B_i (A A^T) B_i^T

Only the product with W is taken layer by layer. The rest is a dozen small operations, and a model has hundreds of
layers, so those of one shape share them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flatlora_diffusion.config import NoiseKind
from flatlora_diffusion.method.layers import AdaptedLayer

FREE = 2**20  # bytes that stacked factors may take in any case: of small layers there are many

Group = tuple[list[AdaptedLayer], Tensor]  # L layers of one shape and their ||W'_i||^2, (L, m) fp32


@dataclass(frozen=True)
class RowStds:
    """Eq. 7's standard deviation at sigma 1 of each row of some `layers` on one device, side by side: (rows,) fp32."""

    layers: list[AdaptedLayer]
    stds: Tensor

    @property
    def rows(self) -> list[int]:
        return [layer.shape[0] for layer in self.layers]

    def times(self, sigma: float) -> dict[str, Tensor]:
        """The standard deviations at `sigma`, (m,) by layer."""
        return dict(zip((layer.name for layer in self.layers), (self.stds * sigma).split(self.rows), strict=True))


@dataclass(frozen=True)
class NormState:
    """The standard deviations at sigma 1 of all rows of all layers, (rows,) fp32, of the steps of interval `turn`."""

    turn: int
    stds: Tensor


class KeptNorms:
    """What ||W'_i|| of `layers` asks of their noise, taken anew in the first perturbed step of each `every` steps."""

    def __init__(self, layers: Mapping[str, AdaptedLayer], every: int, kind: NoiseKind) -> None:
        self._layers, self._every, self._kind = layers, every, kind
        self._turn: int | None = None
        self._kept: list[RowStds] = []
        self._is_one_step = False

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """While this is open they are taken once for a step, however often it is perturbed."""
        self._is_one_step = True
        try:
            yield
        finally:
            self._is_one_step = False
            if self._every == 1:
                self._turn, self._kept = None, []

    def at(self, step: int) -> list[RowStds]:
        """Those that optimizer step `step` uses, kept for the rest of its interval."""
        stds = self.seen_from(step, self._layers.values())
        if self._every > 1 or self._is_one_step:
            self._turn, self._kept = step // self._every, stds
        return stds

    def seen_from(self, step: int, layers: Collection[AdaptedLayer]) -> list[RowStds]:
        """Those that `step` would use now, of `layers` at least."""
        return self._kept if self._turn == step // self._every else _taken(layers, self._kind)

    @property
    def nbytes(self) -> int:
        return sum(some.stds.nbytes for some in self._kept)

    def state(self) -> NormState | None:
        """What is kept, for a checkpoint inside an interval; None when nothing is."""
        if self._turn is None:
            return None
        rows = {name: stds for some in self._kept for name, stds in some.times(1).items()}
        device = next(iter(rows.values())).device
        return NormState(self._turn, torch.cat([rows[name].to(device) for name in self._layers]))

    def load(self, state: NormState) -> None:
        layers = self._layers.values()
        rows = state.stds.split([layer.shape[0] for layer in layers])
        stds = {layer.name: own.to(layer.base.weight.device) for layer, own in zip(layers, rows, strict=True)}
        self._turn, self._kept = state.turn, _by_device(layers, stds)


def _taken(layers: Collection[AdaptedLayer], kind: NoiseKind) -> list[RowStds]:
    stds: dict[str, Tensor] = {}
    for group, square_norms in merged_square_norms(layers):
        of_group = row_stds(square_norms, group[0].inputs, 1.0, kind).unbind()
        stds.update((layer.name, own) for layer, own in zip(group, of_group, strict=True))
    return _by_device(layers, stds)


def _by_device(layers: Iterable[AdaptedLayer], stds: Mapping[str, Tensor]) -> list[RowStds]:
    """In the order of `layers`, whichever norms were taken together."""
    members: dict[torch.device, list[AdaptedLayer]] = {}
    for layer in layers:
        members.setdefault(stds[layer.name].device, []).append(layer)
    return [RowStds(those, torch.cat([stds[layer.name] for layer in those])) for those in members.values()]


def merged_square_norms(layers: Iterable[AdaptedLayer]) -> Iterator[Group]:
    """Groups of L `layers` of one shape, each group with its ||W'_i||^2: (L, m), fp32."""
    for group in _groups(layers):
        is_merged = group[0].tuner.merged  # then W holds sBA already
        yield group, group[0].square_norms().unsqueeze(0) if is_merged else _square_norms(group)


def row_stds(square_norms: Tensor, inputs: int, sigma: float, kind: NoiseKind) -> Tensor:
    """Eq. 7: the standard deviation sigma / sqrt(n) * ||W'_i|| of each row's noise, (..., m) from ||W'_i||^2 (..., m).

    `iid` noise has one standard deviation for all rows of a layer, at equal energy.
    """
    if kind == "iid":
        square_norms = square_norms.mean(dim=-1, keepdim=True).expand_as(square_norms)
    return square_norms.mul(sigma**2 / inputs).sqrt_()


def _groups(layers: Iterable[AdaptedLayer]) -> Iterator[list[AdaptedLayer]]:
    """Layers whose norms are taken together; a merged one is alone."""
    alike: dict[object, list[AdaptedLayer]] = {}
    for layer in layers:
        if layer.tuner.merged:
            yield [layer]
        else:
            alike.setdefault((layer.shape, layer.rank, layer.scale, layer.base.weight.device), []).append(layer)
    for members in alike.values():
        size = _at_once(members[0])
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _at_once(layer: AdaptedLayer) -> int:
    """How many layers like this one fit, with all that is stacked of them, into `FREE` or the memory of their eps."""
    filters = layer.shape[0]
    stacked = layer.rank * (layer.inputs + 3 * filters)  # A, B, W A^T and 2 W A^T + s B A A^T
    return max(1, max(filters * layer.inputs, FREE // 4) // max(1, stacked))


def _square_norms(group: list[AdaptedLayer]) -> Tensor:
    downs, ups = zip(*[layer.factors() for layer in group], strict=True)
    down, up = torch.stack(downs), torch.stack(ups)  # (L, R, n) and (L, m, R)
    crossed = torch.empty_like(up)
    for layer, own, out in zip(group, downs, crossed.unbind(), strict=True):
        layer.weight_times(own, out)
    base = torch.stack([layer.base_square_norms for layer in group]).to(up.device)  # (L, m)
    scale = group[0].scale
    mixed = torch.baddbmm(crossed, up, down @ down.mT, beta=2, alpha=scale)
    return base.add_(mixed.mul_(up).sum(dim=2), alpha=scale).clamp_(min=0)
