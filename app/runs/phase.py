"""The phase of a running run, such as loading or saving, from its files and log."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flatlora_diffusion.storage.run_dir import RunDir

from ..process.launch import Launch
from .progress import Progress

LOADING = "loading the base model"
CACHING = "encoding images and captions"
PREVIEWS = "drawing the previews of the base"
TRAINING = "training"
ENDING = "drawing the last previews and saving the LoRA"
STOPPING = "stopping after this step; it can be resumed"
SAVING = "saving a checkpoint after this step"
FOLDS = "finding the number of steps: fold {} of {}"
MEMBERS = "training member {} of {}"
# The trainer's line as each begins.
_IN_PART = {
    FOLDS: re.compile(r"fold (\d+) of (\d+): trains on"),
    MEMBERS: re.compile(r"member (\d+) of (\d+): trains with"),
}
_HAS_LOADED = re.compile(r"the base is ")  # the trainer's line once the base's weights are there


def phase_of(run: RunDir, launch: Launch | None, progress: Progress, has_previews: bool) -> str:
    """The phase in words.

    Args:
        has_previews: whether the run's settings ask for previews.
    """
    if run.stop_file.exists() or (launch is not None and launch.stop_file.exists()):
        return STOPPING
    if not progress.has_begun or _has_old_events(run, launch):
        return _beginning([] if launch is None else launch.log(200))
    if progress.step == 0 and has_previews and not progress.has_drawn:
        return PREVIEWS
    if progress.total and progress.step >= progress.total:
        return ENDING
    return SAVING if run.save_file.exists() else TRAINING


def _beginning(log: Sequence[str]) -> str:
    """The phase before the first step."""
    for phase, begins in _IN_PART.items():
        parts = [part for line in log if (part := begins.match(line))]
        if parts:
            return phase.format(*parts[-1].groups())
    return CACHING if _has_line(log, _HAS_LOADED) else LOADING


def _has_old_events(run: RunDir, launch: Launch | None) -> bool:
    """Whether all events of the run are from an earlier start that this one resumes."""
    if launch is None or not run.events_file.exists() or not launch.command_file.exists():
        return False
    return run.events_file.stat().st_mtime < launch.command_file.stat().st_mtime


def _has_line(log: Sequence[str], line: re.Pattern[str]) -> bool:
    return any(line.match(one) for one in log)
