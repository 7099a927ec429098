"""The state and phase of a run, from its files, log and processes only, and advice to the user."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flatlora_diffusion.config import ConfigError, StoppedError
from flatlora_diffusion.storage.run_dir import LORA_FILE, MEMBER, RunDir

from ..process.launch import Launch
from .progress import Progress

RunState = Literal["queued", "running", "finished", "failed", "stopped", "interrupted"]

_KILLED = -9
_NO_LORA = "The training ended well, but its LoRA file is gone from the run folder. Restore it or train again."
LOADING = "loading the base model"
CACHING = "encoding images and captions"
PREVIEWS = "drawing the previews of the base"
TRAINING = "training"
ENDING = "drawing the last previews and saving the LoRA"
STOPPING = "stopping after this step; it can be resumed"
SAVING = "saving a checkpoint after this step"
MEMBERS = "training member {} of {}"
_IN_MEMBER = re.compile(r"member (\d+) of (\d+): trains with")  # the trainer's line as each begins
_HAS_LOADED = re.compile(r"the base is ")  # the trainer's line once the base's weights are there


@dataclass(frozen=True)
class StateWithAdvice:
    """A run's state, its exit code if known, and advice; empty advice if there is nothing to do."""

    state: RunState
    exit_code: int | None = None
    advice: str = ""


def run_state(
    launch: Launch | None, progress: Progress, files: RunFiles, is_queued: bool, is_trained: bool
) -> StateWithAdvice:
    """Find a run's state.

    Args:
        launch: the app's last start of the run.
        is_trained: whether a trainer that was started from a command line runs in its folder.
    """
    if is_trained or (launch is not None and launch.is_running()):
        return StateWithAdvice("running")
    if is_queued:
        return StateWithAdvice("queued")
    ending = None if launch is None else launch.ending()
    if launch is None or ending is None or files.changed > ending.time:  # gone on from the command line since
        return _by_events(progress, files)
    if ending.code == 0:
        return StateWithAdvice("finished", 0) if files.has_lora else StateWithAdvice("failed", 0, _NO_LORA)
    if ending.code == StoppedError.exit_code or ending.was_asked:
        return StateWithAdvice("stopped", ending.code, _go_on(files))
    return StateWithAdvice("failed", ending.code, _failure_advice(ending.code, launch.log(1000), files))


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run folder.

    Attributes:
        checkpoint: name of the newest checkpoint, or a description of members.
        changed: last change of the events, in seconds since 1970.
    """

    has_lora: bool
    checkpoint: str | None
    changed: float

    @classmethod
    def of(cls, folder: Path, checkpoints: list[Path]) -> RunFiles:
        events = RunDir(folder).events_file
        return cls(
            has_lora=(folder / LORA_FILE).is_file(),  # and not a base or another LoRA that lies there too
            checkpoint=checkpoints[-1].name if checkpoints else parts_of(folder),
            changed=events.stat().st_mtime if events.exists() else 0.0,
        )


def parts_of(folder: Path) -> str | None:
    """A description of saved members that a run without checkpoints can be resumed from."""
    kept = (*folder.glob(f"{MEMBER}*/checkpoint-*"), *folder.glob(f"{MEMBER}*/{LORA_FILE}"))
    return "its members" if kept else None


def _by_events(progress: Progress, files: RunFiles) -> StateWithAdvice:
    if progress.last == "finished":
        return StateWithAdvice("finished") if files.has_lora else StateWithAdvice("failed", None, _NO_LORA)
    if progress.last == "stopped":
        return StateWithAdvice("stopped", None, _go_on(files))
    reason = "The training does not run any more and has not finished: its process was killed or has failed. "
    return StateWithAdvice("interrupted", None, reason + _go_on(files))


def _failure_advice(code: int, log: list[str], files: RunFiles) -> str:
    sentence = logged_error(log)
    if code == ConfigError.exit_code and sentence:
        return f"{sentence}\nCorrect this setting in a clone of the run, then start that."
    if sentence:
        return f"{sentence}\n{_go_on(files)}"
    if code == _KILLED:
        killed = "The training was killed, most often by the system because memory ran out. "
        return f"{killed}Close other programs, or use a smaller batch or resolution. {_go_on(files)}"
    if code < 0:
        return f"The training was ended by the signal {_signal_name(-code)}. {_go_on(files)}"
    return f"The training ended with exit code {code}; the end of the log says where. {_go_on(files)}"


def logged_error(log: list[str]) -> str:
    """The last `error: ` message in the log with its following lines; empty without one."""
    starts = [place for place, line in enumerate(log) if line.startswith("error: ")]
    return "\n".join(log[starts[-1] :]).removeprefix("error: ") if starts else ""


def _go_on(files: RunFiles) -> str:
    if files.checkpoint is None:
        return "No checkpoint was saved, so start it again from a clone."
    return f"Resume continues from {files.checkpoint}."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def phase_of(run: RunDir, launch: Launch | None, progress: Progress, has_previews: bool) -> str:
    """The phase of a running run, in words; `has_previews`: whether its settings ask for previews."""
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
    members = [member for line in log if (member := _IN_MEMBER.match(line))]
    if members:
        return MEMBERS.format(*members[-1].groups())
    return CACHING if any(map(_HAS_LOADED.match, log)) else LOADING


def _has_old_events(run: RunDir, launch: Launch | None) -> bool:
    """Whether all events of the run are from an earlier start that this one resumes."""
    if launch is None or not run.events_file.exists() or not launch.command_file.exists():
        return False
    return run.events_file.stat().st_mtime < launch.command_file.stat().st_mtime
