"""The update that a LoRA of any variant adds to each layer, as two factors and a scale: the form that files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatlora_diffusion.adapter.full import whole_change
from flatlora_diffusion.adapter.layers import ADAPTER, base_weight, lora_layers
from flatlora_diffusion.adapter.svd_start import ANCHOR
from flatlora_diffusion.config import TEXT_PARTS
from flatlora_diffusion.method.layers import factors_of, scale_of, square_norm
from flatlora_diffusion.storage.rng import generator

PARTS = ("unet", *TEXT_PARTS)
FOLD_RANK = 32  # of the plain LoRA made of a DoRA, whose change of the rows' magnitudes has full rank
_POWER_STEPS = 4
# Largest entries between which fp16 rounds as it should; outside of it some entries are subnormal or infinite.
_FINE = (2.0**-9, 2.0**14)


class Update(NamedTuple):
    """`scale` times B A: `down` is A, (r, in) or (r, in, kh, kw); `up` is B, (out, r) or (out, r, 1, 1)."""

    down: Tensor
    up: Tensor
    scale: float


Updates = Mapping[str, Mapping[str, Update]]
"""Updates by module path, by part of the pipeline; fp32 on the CPU."""


class LazyLayers(Mapping[str, Update]):
    """Updates by module path that are read anew each time they are asked for, so that one at a time is in memory."""

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
    """The factors of every LoRA layer, for DoRA those of its direction; parts without a LoRA are left out."""
    return {part: {module: _factors(one) for module, one in layers.items()} for part, layers in _layers(pipeline)}


def magnitudes(pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """DoRA's trained magnitudes by module path, by part; empty for another LoRA."""
    by_part: dict[str, dict[str, Tensor]] = {}
    for part, layers in _layers(pipeline):
        for module, layer in layers.items():
            if ADAPTER in layer.lora_magnitude_vector:
                value = layer.lora_magnitude_vector[ADAPTER].weight.detach().float().cpu().contiguous()
                by_part.setdefault(part, {})[module] = value
    return by_part


def plain_updates(pipeline: Any, updates: Updates) -> tuple[Updates, float]:
    """The factors of a plain LoRA with the effect of `lora_updates`, and what it misses, ||missed|| / ||effect||.

    That is 0 but for DoRA, whose W' - W is folded into a truncated SVD of rank 32, or its own rank if that is higher,
    and for full fine-tuning, of which the SVD has the rank that was asked for.
    """
    folds = {
        part: {module: _folded(layer, updates[part][module]) for module, layer in layers.items()}
        for part, layers in _layers(pipeline)
    }
    missed = sum(fold.missed for layers in folds.values() for fold in layers.values())
    whole = sum(fold.whole for layers in folds.values() for fold in layers.values())
    plain = {part: {module: fold.update for module, fold in layers.items()} for part, layers in folds.items()}
    return plain, (missed / whole) ** 0.5 if whole else 0.0


def shared_path(part: str, module: str) -> str:
    """The module path that all tools know: with the `text_model.` that transformers has dropped from CLIP-L."""
    return module if part == "unet" else f"text_model.{module.removeprefix('text_model.')}"


def with_magnitudes(direction: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's W': each row of W + s B A, (m, ...), scaled to the length that `magnitude` (m,) gives it."""
    factors = magnitude / direction.flatten(1).norm(dim=1)
    return direction * factors.view(-1, *[1] * (direction.ndim - 1))


def truncated(change: Tensor, rank: int) -> Update:
    """The best factors of `rank` of a matrix (m, n): singular values shared evenly, by subspace iteration."""
    rank = min(rank, *change.shape)
    wide = min(rank + 8, *change.shape)
    probe = torch.randn(change.shape[1], wide, generator=generator("cpu", 0, "truncated_svd")).to(change)
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(change @ probe)[0]
        probe = torch.linalg.qr(change.T @ basis)[0]
    basis = torch.linalg.qr(change @ probe)[0]
    left, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
    root = values[:rank].sqrt()
    return Update(root[:, None] * right[:rank], basis @ left[:, :rank] * root, 1.0)


def cut_to_rank(update: Update, rank: int) -> tuple[Update, Tensor]:
    """The best factors of at most `rank` for s B A with a scale of 1, and all its singular values; in double.

    From B = Q_b R_b and A^T = Q_a R_a the singular values of B A are those of the small matrix R_b R_a^T, so that B A
    is not formed. The factors have the shapes and the dtype of the old ones.
    """
    up_basis, up_rest = torch.linalg.qr(update.up.double().flatten(1))
    down_basis, down_rest = torch.linalg.qr(update.down.double().flatten(1).T)
    left, values, right = torch.linalg.svd(update.scale * up_rest @ down_rest.T, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    up = (up_basis @ left[:, :kept] * root).view(len(update.up), kept, *update.up.shape[2:])
    down = (root[:, None] * (right[:kept] @ down_basis.T)).view(kept, *update.down.shape[1:])
    return Update(down.to(update.down.dtype), up.to(update.up.dtype), 1.0), values


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product by factors that fp16 can hold: a power of two is moved between them where it must be."""
    sizes = [float(factor.abs().max()) for factor in (down, up)]
    if not all(sizes) or all(_FINE[0] <= size <= _FINE[1] for size in sizes):
        return down, up
    exponents = [int(torch.frexp(torch.tensor(size)).exponent) for size in sizes]
    shift = (exponents[1] - exponents[0]) // 2
    return down * 2.0**shift, up * 2.0**-shift


def norm(update: Update) -> float:
    """||s B A||_F without forming B A, in double."""
    down, up = update.down.double().flatten(1), update.up.double().flatten(1)
    return float(square_norm(down, up).clamp(min=0)) ** 0.5 * update.scale


def difference(one: Update, other: Update) -> float:
    """||s B A - s' B' A'||_F without forming either; exact to about 1e-8 of their size."""
    down = torch.cat([one.down.double().flatten(1), other.down.double().flatten(1)])
    up = torch.cat([one.up.double().flatten(1) * one.scale, other.up.double().flatten(1) * -other.scale], dim=1)
    return norm(Update(down, up, 1.0))


def update_norms(updates: Mapping[str, Mapping[str, Update]]) -> dict[str, float]:
    """||s B A||_F over all layers of each part."""
    return {part: sum(norm(update) ** 2 for update in layers.values()) ** 0.5 for part, layers in updates.items()}


def _layers(pipeline: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The LoRA layers by module path of each part that has any."""
    for part in PARTS:
        layers = lora_layers(getattr(pipeline, part))
        if layers:
            yield part, {shared_path(part, name): layer for name, layer in layers.items()}


class _Fold(NamedTuple):
    """A plain LoRA of one layer, and for a DoRA's the squared norms of what it misses and of the whole effect."""

    update: Update
    missed: float = 0.0
    whole: float = 0.0


def _folded(layer: Any, factors: Update) -> _Fold:
    change = whole_change(layer)
    if change is not None:
        missed = (change - factors.up @ factors.down).double().square().sum()
        return _Fold(factors, float(missed), float(change.double().square().sum()))
    if ADAPTER not in layer.lora_magnitude_vector:
        return _Fold(factors)
    change = _dora_change(layer).cpu()  # MPS has no float64, and not all that a truncated SVD needs
    folded = truncated(change, max(FOLD_RANK, len(factors.down)))
    down = folded.down.view(-1, *factors.down.shape[1:])
    up = folded.up.view(len(folded.up), -1, *factors.up.shape[2:])
    return _Fold(
        Update(down.contiguous(), up.contiguous(), 1.0),
        missed=float((change - folded.up @ folded.down).double().square().sum()),
        whole=float(change.double().square().sum()),
    )


def _factors(layer: Any) -> Update:
    """A and B; of a LoRA with an anchor [A; A0] and [B, -B0]; of AdaLoRA what ranks are left; of dW by SVD."""
    change = whole_change(layer)
    if change is not None:
        return truncated(change, layer.r[ADAPTER])
    down, up = (side.detach().float().cpu().contiguous() for side in factors_of(layer, ADAPTER))
    if ADAPTER in getattr(layer, "lora_E", ()):
        left = layer.lora_E[ADAPTER].detach().flatten().cpu() != 0
        left[0] |= not left.any()  # a file has at least one of each layer
        down, up = down[left], up[:, left]
    if ANCHOR in layer.lora_A:
        first_down, first_up = (side[ANCHOR].weight.detach().float().cpu() for side in (layer.lora_A, layer.lora_B))
        down, up = torch.cat([down, first_down]), torch.cat([up, -first_up], dim=1)
    return Update(down, up, scale_of(layer, ADAPTER))


@torch.no_grad()
def _dora_change(layer: Any) -> Tensor:
    """W' - W of a DoRA layer, (out, in * kh * kw): each row of W + s B A scaled to its magnitude, minus W."""
    down, up = (side[ADAPTER].weight.float().flatten(1) for side in (layer.lora_A, layer.lora_B))
    weight = base_weight(layer.get_base_layer()).flatten(1)
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight.float().flatten()
    return with_magnitudes(weight + layer.scaling[ADAPTER] * (up @ down), magnitude) - weight
