"""The update of each layer by any LoRA variant as two factors and a scale, which is the form of LoRA files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flatlora_diffusion.adapter.full import full_delta
from flatlora_diffusion.adapter.layers import ADAPTER, base_weight, lora_layers, parts_of
from flatlora_diffusion.adapter.svd_start import ANCHOR
from flatlora_diffusion.config import DENOISERS
from flatlora_diffusion.method.layers import factors_of, scale_of, square_norm
from flatlora_diffusion.storage.rng import generator

FOLD_RANK = 32  # of the plain LoRA that approximates a DoRA, whose update has full rank
_POWER_STEPS = 4
# Range of a factor's largest entry in fp16; outside some entries are subnormal or infinite.
_FP16_RANGE = (2.0**-9, 2.0**14)


class Update(NamedTuple):
    """`scale` times B A: `down` is A, (r, in) or (r, in, kh, kw); `up` is B, (out, r) or (out, r, 1, 1)."""

    down: Tensor
    up: Tensor
    scale: float


def padded(update: Update, rank: int) -> Update:
    """The update with zeros in its factors up to `rank`; unchanged if it has this rank or more."""
    down, up, scale = update
    missing = max(0, rank - len(down))
    # F.pad counts from the last axis. The rank is A's first axis and B's second.
    up = F.pad(up, (*[0, 0] * (up.ndim - 2), 0, missing))
    return Update(F.pad(down, (*[0, 0] * (down.ndim - 1), 0, missing)), up, scale)


Updates = Mapping[str, Mapping[str, Update]]
"""Updates by module path, by part of the pipeline; fp32 on the CPU."""


class LazyLayers(Mapping[str, Update]):
    """Updates by module path that are read on each access, so that only a single layer is in memory."""

    def __init__(self, modules: Iterable[str], read: Callable[[str], Update]) -> None:
        self._modules = dict.fromkeys(modules)
        self._read = read

    def __getitem__(self, module: str) -> Update:
        if module not in self._modules:
            raise KeyError(module)
        return self._read(module)

    def __contains__(self, module: object) -> bool:
        return module in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def lora_updates(pipeline: Any) -> Updates:
    """The factors of each LoRA layer by part; for DoRA those of its direction. Parts without a LoRA are left out."""
    return {part: {module: _factors(layer) for module, layer in layers.items()} for part, layers in _layers(pipeline)}


def magnitudes(pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """DoRA's trained magnitudes by module path, by part; empty for other adapters."""
    by_part: dict[str, dict[str, Tensor]] = {}
    for part, layers in _layers(pipeline):
        for module, layer in layers.items():
            if ADAPTER in layer.lora_magnitude_vector:
                value = layer.lora_magnitude_vector[ADAPTER].weight.detach().float().cpu().contiguous()
                by_part.setdefault(part, {})[module] = value
    return by_part


def plain_updates(pipeline: Any, updates: Updates) -> tuple[Updates, float]:
    """Approximate DoRA and full fine-tuning by a plain LoRA; other adapters are plain already.

    Args:
        pipeline: the pipeline with the trained adapter.
        updates: its `lora_updates`.

    Returns:
        The factors of the plain LoRA, and its relative error ||error|| / ||update|| over all layers. A DoRA gets a
        truncated SVD of rank 32, or its own if that is higher; full fine-tuning one of --rank.
    """
    folds = {
        part: {module: _fold(layer, updates[part][module]) for module, layer in layers.items()}
        for part, layers in _layers(pipeline)
    }
    error = sum(fold.error for layers in folds.values() for fold in layers.values())
    total = sum(fold.total for layers in folds.values() for fold in layers.values())
    plain = {part: {module: fold.update for module, fold in layers.items()} for part, layers in folds.items()}
    return plain, (error / total) ** 0.5 if total else 0.0


def shared_path(part: str, module: str) -> str:
    """The module path as all tools know it, with the `text_model.` that transformers has dropped from CLIP-L."""
    return module if part in DENOISERS else f"text_model.{module.removeprefix('text_model.')}"


def with_magnitudes(direction: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's W': each row of `direction` W + s B A, (m, ...), scaled to the norm `magnitude`, (m,)."""
    factors = magnitude / direction.flatten(1).norm(dim=1)
    return direction * factors.view(-1, *[1] * (direction.ndim - 1))


def truncated_svd(change: Tensor, rank: int) -> Update:
    """The best approximation of a matrix (m, n) by factors of rank `rank`, by subspace iteration."""
    rank = min(rank, *change.shape)
    oversampled = min(rank + 8, *change.shape)
    probe = torch.randn(change.shape[1], oversampled, generator=generator("cpu", 0, "truncated_svd")).to(change)
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(change @ probe)[0]
        probe = torch.linalg.qr(change.T @ basis)[0]
    basis = torch.linalg.qr(change @ probe)[0]
    left, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
    root = values[:rank].sqrt()
    return Update(root[:, None] * right[:rank], basis @ left[:, :rank] * root, 1.0)


def cut_to_rank(update: Update, rank: int) -> tuple[Update, Tensor]:
    """The best approximation of s B A of at most rank `rank`, with a scale of 1, in shapes and dtypes of `update`.

    From B = Q_b R_b and A^T = Q_a R_a the singular values of B A are those of the small matrix R_b R_a^T, so B A is
    never formed. Computed in double.

    Returns:
        The approximation, and all singular values of s B A.
    """
    up_basis, up_triangle = torch.linalg.qr(update.up.double().flatten(1))
    down_basis, down_triangle = torch.linalg.qr(update.down.double().flatten(1).T)
    left, values, right = torch.linalg.svd(update.scale * up_triangle @ down_triangle.T, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    up = (up_basis @ left[:, :rank] * root).view(len(update.up), rank, *update.up.shape[2:])
    down = (root[:, None] * (right[:rank] @ down_basis.T)).view(rank, *update.down.shape[1:])
    return Update(down.to(update.down.dtype), up.to(update.up.dtype), 1.0), values


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with factors in the range of fp16, by moving a power of two between them if necessary."""
    sizes = [float(factor.abs().max()) for factor in (down, up)]
    if not all(sizes) or all(_FP16_RANGE[0] <= size <= _FP16_RANGE[1] for size in sizes):
        return down, up
    exponents = [int(torch.frexp(torch.tensor(size)).exponent) for size in sizes]
    shift = (exponents[1] - exponents[0]) // 2
    return down * 2.0**shift, up * 2.0**-shift


def norm(update: Update) -> float:
    """||s B A||_F without forming B A, in double."""
    down, up = update.down.double().flatten(1), update.up.double().flatten(1)
    return float(square_norm(down, up).clamp(min=0)) ** 0.5 * update.scale


def difference(first: Update, second: Update) -> float:
    """||s B A - s' B' A'||_F without forming either product; the error is about 1e-8 of their norms."""
    down = torch.cat([first.down.double().flatten(1), second.down.double().flatten(1)])
    up = torch.cat([first.up.double().flatten(1) * first.scale, second.up.double().flatten(1) * -second.scale], dim=1)
    return norm(Update(down, up, 1.0))


def update_norms(updates: Mapping[str, Mapping[str, Update]]) -> dict[str, float]:
    """||s B A||_F over all layers of each part."""
    return {part: sum(norm(update) ** 2 for update in layers.values()) ** 0.5 for part, layers in updates.items()}


def _layers(pipeline: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The LoRA layers by module path of each part that has any."""
    for part in parts_of(pipeline):
        layers = lora_layers(getattr(pipeline, part))
        if layers:
            yield part, {shared_path(part, name): layer for name, layer in layers.items()}


class _Fold(NamedTuple):
    """A plain LoRA of a layer, and the squared norms of its error and of the exact update."""

    update: Update
    error: float = 0.0
    total: float = 0.0


def _fold(layer: Any, factors: Update) -> _Fold:
    change = full_delta(layer)
    if change is not None:
        error = (change - factors.up @ factors.down).double().square().sum()
        return _Fold(factors, float(error), float(change.double().square().sum()))
    if ADAPTER not in layer.lora_magnitude_vector:
        return _Fold(factors)
    change = _dora_change(layer).cpu()  # MPS lacks float64 and parts of the SVD
    folded = truncated_svd(change, max(FOLD_RANK, len(factors.down)))
    down = folded.down.view(-1, *factors.down.shape[1:])
    up = folded.up.view(len(folded.up), -1, *factors.up.shape[2:])
    return _Fold(
        Update(down.contiguous(), up.contiguous(), 1.0),
        error=float((change - folded.up @ folded.down).double().square().sum()),
        total=float(change.double().square().sum()),
    )


def _factors(layer: Any) -> Update:
    """A and B: with an anchor [A; A0] and [B, -B0], for AdaLoRA the remaining ranks, for full fine-tuning by SVD."""
    change = full_delta(layer)
    if change is not None:
        return truncated_svd(change, layer.r[ADAPTER])
    down, up = (factor.detach().float().cpu().contiguous() for factor in factors_of(layer, ADAPTER))
    if ADAPTER in getattr(layer, "lora_E", ()):
        is_active = layer.lora_E[ADAPTER].detach().flatten().cpu() != 0
        is_active[0] |= not is_active.any()  # files need at least rank 1
        down, up = down[is_active], up[:, is_active]
    if ANCHOR in layer.lora_A:
        first_down, first_up = (side[ANCHOR].weight.detach().float().cpu() for side in (layer.lora_A, layer.lora_B))
        down, up = torch.cat([down, first_down]), torch.cat([up, -first_up], dim=1)
    return Update(down, up, scale_of(layer, ADAPTER))


@torch.no_grad()
def _dora_change(layer: Any) -> Tensor:
    """W' - W of a DoRA layer, (out, in * kh * kw)."""
    down, up = (side[ADAPTER].weight.float().flatten(1) for side in (layer.lora_A, layer.lora_B))
    weight = base_weight(layer.get_base_layer()).flatten(1)
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight.float().flatten()
    return with_magnitudes(weight + layer.scaling[ADAPTER] * (up @ down), magnitude) - weight
