"""Estimates training time from the steps of existing runs, or else from the time to draw a picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.config import METHODS
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.sampling import generate_images

_RECOMPUTED = 1.5  # passes that --gradient_checkpointing adds to a gradient: LoRA's steps took 1.6 times as long
_START_SECONDS = 10  # for the process of a training to import its libraries and load the base


def step_seconds(runs: Sequence[PlannedRun]) -> dict[str, float]:
    """The median seconds per step of each arm that has steps in one of `runs`, by the arm's key."""
    seconds: dict[str, list[float]] = {}
    for planned in runs:
        seconds.setdefault(planned.arm.key, []).extend(planned.timed_steps)
    return {arm: statistics.median(values) for arm, values in seconds.items() if values}


def training_seconds(pending: Sequence[PlannedRun], runs: Sequence[PlannedRun], pass_seconds: float) -> float:
    """Estimate the time to train the remaining steps of `pending`, some of the experiment's `runs`.

    An arm's step takes as long as its earlier steps, or else in proportion to its passes as long as those of other
    arms.

    Args:
        pass_seconds: The seconds of a pass through the denoiser, for use if no run has any step.
    """
    known = step_seconds(runs)
    passes = {planned.arm.key: _passes_per_step(planned) for planned in runs}
    if known:
        pass_seconds = statistics.fmean(seconds / passes[arm] for arm, seconds in known.items())
    return sum(_run_seconds(planned, runs, known, pass_seconds) for planned in pending)


def seconds_per_pass(base: Base, resolution: int) -> float:
    """Time the pass of one sample through the denoiser while drawing; a slow denoiser is timed for one step only."""
    seconds = 0.0
    for steps in (1, 5):
        if seconds < 1:
            start = time.perf_counter()
            generate_images(base, ["an icon"], [0], ImageSettings(resolution, steps), batch_size=1)
            seconds = (time.perf_counter() - start) / (2 * steps)
    return seconds


def duration_text(seconds: float) -> str:
    """Write a duration in minutes or hours."""
    if seconds < 90:
        return "a minute"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _run_seconds(
    planned: PlannedRun, runs: Sequence[PlannedRun], known: Mapping[str, float], pass_seconds: float
) -> float:
    """The remaining time of a run, including the trainings of its members."""
    if planned.is_finished:
        return 0
    seconds = known.get(planned.arm.key, pass_seconds * _passes_per_step(planned))
    trainings = planned.config.average.trainings - _shares_member(planned, runs)
    return _START_SECONDS + trainings * planned.remaining_steps * seconds


def _shares_member(planned: PlannedRun, runs: Sequence[PlannedRun]) -> bool:
    """Whether the first member of an average is one of `runs`, from which it is copied."""
    if planned.config.average.members is None:
        return False
    places = ("output_dir", "output_name")
    return any(
        planned.config.replace(members=None, **{name: getattr(other.config.run, name) for name in places})
        == other.config
        for other in runs
    )


def _passes_per_step(planned: PlannedRun) -> float:
    optim, method = planned.config.optim, METHODS[planned.arm.method]
    recomputed = _RECOMPUTED * method.gradients if optim.gradient_checkpointing else 0.0
    return optim.train_batch_size * optim.gradient_accumulation_steps * (method.passes + recomputed)
