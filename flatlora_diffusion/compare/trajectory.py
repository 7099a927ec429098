"""The held-out loss of two runs where they are alike: at one clean training loss, or after equally many seconds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TrajectoryPoint:
    """The measurements after `step` steps and `seconds` of training; step 0 is the base."""

    step: int
    seconds: float
    clean_train_loss: float
    heldout_loss: float
    drift: float | None = None
    memorization: float | None = None


Pair = tuple[float, float]


def at_equal_loss(one: Sequence[TrajectoryPoint], other: Sequence[TrajectoryPoint]) -> Pair:
    """The held-out losses where each run first reaches the clean training loss that both of them reach.

    Between two checkpoints both losses are taken to change evenly. The points are in the order of their steps.
    """
    target = max(min(point.clean_train_loss for point in run) for run in (one, other))
    return _where(one, lambda point: point.clean_train_loss, target), _where(
        other, lambda point: point.clean_train_loss, target
    )


def at_equal_seconds(one: Sequence[TrajectoryPoint], other: Sequence[TrajectoryPoint]) -> Pair:
    """The held-out losses after as many seconds as the shorter of both runs took."""
    target = min(one[-1].seconds, other[-1].seconds)
    return _where(one, lambda point: -point.seconds, -target), _where(other, lambda point: -point.seconds, -target)


def _where(run: Sequence[TrajectoryPoint], falling: Callable[[TrajectoryPoint], float], target: float) -> float:
    """The held-out loss where `falling` first comes down to `target`, which it does."""
    for before, after in itertools.pairwise(run):
        start, end = falling(before), falling(after)
        if start <= target:
            return before.heldout_loss
        if end <= target:
            share = (start - target) / (start - end)
            return before.heldout_loss + share * (after.heldout_loss - before.heldout_loss)
    return run[-1].heldout_loss
