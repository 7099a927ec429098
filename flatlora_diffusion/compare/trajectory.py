"""The losses of a run over its steps: two runs at equal loss or time, and the best checkpoint and strength."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
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


# Smallest advantage, as a share of the gain over the base, for which another checkpoint or strength is recommended.
MIN_GAIN = 0.02
# Increase of the similarity to the nearest training image that counts as copying if the held-out loss rises as well.
COPYING_INCREASE = 0.02

_NO_GAIN = (
    "No checkpoint has a lower held-out loss than the base: use fewer steps or a lower learning rate, or more of both "
    "if the LoRA has learned nothing."
)
_NO_SIGN = "The held-out loss did not rise before the end: no sign of over-fitting."
_NO_CHECKPOINT = "There is no earlier checkpoint to compare with, so over-fitting cannot be detected."


@dataclass(frozen=True)
class Advice:
    """A recommendation: use the LoRA of step `checkpoint` at `strength`."""

    checkpoint: int
    strength: float
    over_fit: bool
    why: str


def advise(run: Sequence[TrajectoryPoint], strengths: Mapping[float, float]) -> Advice:
    """Recommend the checkpoint and strength with the lowest held-out loss.

    `run` goes from the base (step 0) to the finished LoRA, whose held-out losses at other strengths are `strengths`.
    """
    base, last = run[0], run[-1]
    best = min(run[1:], key=lambda point: point.heldout_loss)
    gain = base.heldout_loss - best.heldout_loss
    if gain <= 0:
        return Advice(best.step, 1.0, last.heldout_loss > base.heldout_loss, _NO_GAIN)
    lost = last.heldout_loss - best.heldout_loss
    if lost > MIN_GAIN * gain:
        return Advice(best.step, 1.0, True, _overfit_reason(best, last, lost / gain))
    strength = min(strengths, key=lambda at: strengths[at], default=1.0)
    if strengths and strengths[1.0] - strengths[strength] > MIN_GAIN * gain:
        share = (strengths[1.0] - strengths[strength]) / gain
        why = f"No sign of over-fitting; at strength {strength:g} the gain over the base grows by {share:.0%}."
        return Advice(last.step, strength, False, why)
    return Advice(last.step, 1.0, False, _NO_CHECKPOINT if len(run) == 2 else _NO_SIGN)


def _overfit_reason(best: TrajectoryPoint, last: TrajectoryPoint, share: float) -> str:
    why = f"From step {best.step} to {last.step} the held-out loss rose and lost {share:.0%} of the gain"
    if best.memorization is not None and last.memorization is not None:
        increase = last.memorization - best.memorization
        why += f", and pictures came {'closer' if increase > 0 else 'no closer'} to training images ({increase:+.3f})"
        if increase > COPYING_INCREASE:
            why += ", a sign of copying"
    if last.drift is not None and best.drift is not None:
        why += f"; pictures of unrelated prompts changed by {last.drift:.4f}, at step {best.step} by {best.drift:.4f}"
    return why + "."
