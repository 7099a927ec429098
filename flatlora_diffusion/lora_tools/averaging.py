"""The average of several LoRAs of one base as one LoRA: the weighted mean of what each adds to the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from flatlora_diffusion.adapter.update import PARTS, Update, Updates, cut_to_rank


class Average(NamedTuple):
    """The averaged updates, and the share that a cut lost: ||lost||_F / ||whole||_F over all layers, 0 without one."""

    updates: dict[str, dict[str, Update]]
    lost: float


def average_updates(members: Sequence[Updates], weights: Sequence[float], rank: int | None = None) -> Average:
    """sum_i w_i s_i B_i A_i for each layer, with the `weights` w_i as given; fp32 factors of scale 1.

    The factors stand side by side, so the rank is the sum of the members' ranks and the average is exact. With `rank`
    each layer is cut by SVD to the best LoRA of at most that rank. All members must adapt the same layers.
    """
    averaged: dict[str, dict[str, Update]] = {}
    lost, whole = 0.0, 0.0
    for part in PARTS:
        for module in members[0].get(part, {}):
            update = _side_by_side([member[part][module] for member in members], weights)
            if rank is not None:
                update, values = cut_to_rank(update, rank)
                lost += float(values[rank:].square().sum())
                whole += float(values.square().sum())
            averaged.setdefault(part, {})[module] = update
    return Average(averaged, math.sqrt(lost / whole) if whole else 0.0)


def _side_by_side(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """A stacked, B in columns; the scale and the weight of each are multiplied into its B."""
    down = torch.cat([update.down for update in updates])
    ups = (update.up * (update.scale * weight) for update, weight in zip(updates, weights, strict=True))
    return Update(down, torch.cat(list(ups), dim=1), 1.0)
