"""How long trainings take: by the steps of runs that are there, or else by the time that a picture takes to draw."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.config import METHODS
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.sdxl.sampling import generate_images

_RECOMPUTED = 1.5  # passes that --gradient_checkpointing adds to a gradient: LoRA's steps took 1.6 times as long
_START_SECONDS = 10  # in which the process of a training imports its libraries and loads the base


def step_seconds(runs: Sequence[PlannedRun]) -> dict[str, float]:
    """Seconds of a step of each arm, by its key, that has steps in one of `runs`: the median."""
    found: dict[str, list[float]] = {}
    for planned in runs:
        if planned.is_begun or planned.is_finished:
            found.setdefault(planned.arm.key, []).extend(event["seconds"] for event in planned.run.steps())
    return {arm: statistics.median(seconds) for arm, seconds in found.items() if seconds}


def training_seconds(left: Sequence[PlannedRun], runs: Sequence[PlannedRun], each: float) -> float:
    """How long it takes to train what is left of some of `runs`, a pass taking `each` second where none has steps.

    An arm's steps take as long as those that it has, or else by its passes as long as those of other arms.
    """
    known = step_seconds(runs)
    passes = {planned.arm.key: _passes(planned) for planned in runs}
    if known:
        each = statistics.fmean(seconds / passes[arm] for arm, seconds in known.items())
    return sum(_seconds(planned, known, each) for planned in left)


def seconds_per_pass(sdxl: Sdxl, resolution: int) -> float:
    """How long one sample takes through the UNet while a picture is drawn; a slow one is timed for one step alone."""
    seconds = 0.0
    for steps in (1, 5):
        if seconds < 1:
            began = time.perf_counter()
            generate_images(sdxl, ["an icon"], [0], resolution, steps, batch_size=1)
            seconds = (time.perf_counter() - began) / (2 * steps)
    return seconds


def in_words(seconds: float) -> str:
    """A duration as it is told."""
    if seconds < 90:
        return "a minute"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _seconds(planned: PlannedRun, known: Mapping[str, float], each: float) -> float:
    """Of what is left of a training and, before it, of its folds, or of its members."""
    if planned.is_finished:
        return 0
    of_step = known.get(planned.arm.key, each * _passes(planned))
    trainings = planned.config.data.holdout_folds + planned.config.average.trainings
    return _START_SECONDS + trainings * planned.steps_left * of_step


def _passes(planned: PlannedRun) -> float:
    """How many a step of the run has."""
    optim, method = planned.config.optim, METHODS[planned.arm.method]
    recomputed = _RECOMPUTED * method.gradients if optim.gradient_checkpointing else 0.0
    return optim.train_batch_size * optim.gradient_accumulation_steps * (method.passes + recomputed)
