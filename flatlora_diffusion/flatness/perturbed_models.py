"""Changes of a LoRA in use: strength, precision, rank, another base, a second LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from flatlora_diffusion.adapter.delta import Update, balanced, cut_to_rank
from flatlora_diffusion.flatness.functional import Weights
from flatlora_diffusion.flatness.merged_weights import Delta, Deltas, merged

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

Rounding = Literal["fp16", "fp8", "int8"]


@dataclass(frozen=True)
class OtherModels:
    """Models to combine a LoRA with: a second LoRA, and the weights of another base of the same architecture."""

    second_lora: Deltas = field(default_factory=dict)
    other_base: Weights = field(default_factory=dict)


def variants(base: Weights, deltas: Deltas, others: OtherModels) -> Iterator[tuple[str, Weights]]:
    """Yield (name, W') with factors, base or W' rounded, with lower ranks, and with other models."""
    for kind in get_args(Rounding):
        yield f"LoRA in {kind}", merged(base, round_factors(deltas, kind))
    for rank in _lower_ranks(deltas):
        yield f"LoRA cut to rank {rank}", merged(base, truncate_rank(deltas, rank))
    for kind in get_args(Rounding):
        yield f"W' in {kind}", {name: round_to(weight, kind) for name, weight in merged(base, deltas).items()}
    for kind in get_args(Rounding):
        rounded_base = {name: round_to(weight, kind) for name, weight in base.items()}
        yield f"base in {kind}, LoRA whole", merged(rounded_base, deltas)
    if others.second_lora:
        yield "second LoRA alone", merged(base, others.second_lora)
        yield "with the second LoRA", merged(merged(base, deltas), others.second_lora)
    if others.other_base:
        yield "other base alone", others.other_base
        yield "on the other base", merged(others.other_base, deltas)


def round_factors(deltas: Deltas, kind: Rounding) -> Deltas:
    """Round both factors of each layer, after balancing them as in saved files."""
    rounded = {}
    for name, delta in deltas.items():
        down, up = balanced(delta.down, delta.up)
        rounded[name] = replace(delta, down=round_to(down, kind), up=round_to(up, kind))
    return rounded


@torch.no_grad()
def truncate_rank(deltas: Deltas, rank: int) -> Deltas:
    """Return the best approximation of each delta with `rank`, by its largest singular values."""
    return {name: _cut(delta, rank) for name, delta in deltas.items()}


@torch.no_grad()
def round_to(values: Tensor, kind: Rounding) -> Tensor:
    """Round `values` to fp16, to fp8 (e4m3, by casting as other tools do) or to int8 with a scale for each row."""
    if kind == "fp16":
        return values.half().to(values)
    if kind == "fp8":
        largest = torch.finfo(torch.float8_e4m3fn).max
        return values.clamp(-largest, largest).to(torch.float8_e4m3fn).to(values)
    rows = values.flatten(1)
    step = rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny) / 127
    return ((rows / step).round() * step).view_as(values)


def _lower_ranks(deltas: Deltas) -> list[int]:
    """Return the powers of two below the LoRA's rank."""
    highest = max(len(delta.down) for delta in deltas.values())
    return [2**power for power in range(highest.bit_length()) if 2**power < highest]


def _cut(delta: Delta, rank: int) -> Delta:
    smaller, _ = cut_to_rank(Update(delta.down, delta.up, 1.0), rank)
    return replace(delta, down=smaller.down, up=smaller.up)
