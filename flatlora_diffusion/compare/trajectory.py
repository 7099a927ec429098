"""Compares the held-out loss of two runs at equal unperturbed training loss, or at equal training time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TrajectoryPoint:
    """Measurements after `step` steps and `seconds` of training; step 0 is the base."""

    step: int
    seconds: float
    clean_train_loss: float
    heldout_loss: float
    drift: float | None = None
    memorization: float | None = None


Pair = tuple[float, float]


def losses_at_equal_loss(first: Sequence[TrajectoryPoint], second: Sequence[TrajectoryPoint]) -> Pair:
    """The held-out losses at the lowest unperturbed training loss that both runs reach.

    Losses are interpolated linearly between checkpoints. The points are in the order of their steps.
    """
    target = max(min(point.clean_train_loss for point in run) for run in (first, second))
    return (
        _interpolated(first, lambda point: point.clean_train_loss, target),
        _interpolated(second, lambda point: point.clean_train_loss, target),
    )


def losses_at_equal_seconds(first: Sequence[TrajectoryPoint], second: Sequence[TrajectoryPoint]) -> Pair:
    """The held-out losses after the training time of the shorter run."""
    target = min(first[-1].seconds, second[-1].seconds)
    return (
        _interpolated(first, lambda point: -point.seconds, -target),
        _interpolated(second, lambda point: -point.seconds, -target),
    )


def _interpolated(run: Sequence[TrajectoryPoint], falling: Callable[[TrajectoryPoint], float], target: float) -> float:
    """The held-out loss where the quantity `falling` first reaches `target`, which it must reach."""
    for before, after in itertools.pairwise(run):
        start, end = falling(before), falling(after)
        if start <= target:
            return before.heldout_loss
        if end <= target:
            share = (start - target) / (start - end)
            return before.heldout_loss + share * (after.heldout_loss - before.heldout_loss)
    return run[-1].heldout_loss
