"""Plans and trains the runs of an experiment, one for each arm and seed; reuses finished runs, resumes partial runs.

All runs of a seed share every setting except those that their arm changes.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from flatlora_diffusion.config import (
    METHODS,
    QUIET_VARIABLE,
    ConfigError,
    ModelConfig,
    RunError,
    TrainConfig,
    cleared_by,
    methods_with,
    read_setting,
    settings_not_of,
    settings_with,
    why_removed,
)
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.storage.formatting import slug
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.storage.saved_config import portable
from flatlora_diffusion.training.resolve_config import is_made_with

logger = logging.getLogger(__name__)

Role = Literal["arm", "null"]

# An arm cannot change these: seeds pair the runs, folders and intervals belong to the experiment, and runs on another
# base, on other images or in another precision are not comparable.
_SHARED_SETTINGS = {*settings_with("is_shared"), *(item.name for item in fields(ModelConfig))}
# Settings that a reusable run must have in common beyond those of its steps: its end, checkpoints and file precision.
_FIXED_SETTINGS = ("max_train_steps", "checkpointing_steps", "save_dtype")

STOP_INTERVAL = 1.0  # seconds between requests to a run to stop
_WATCH_INTERVAL = 5.0  # seconds between looks at a run that trains


@dataclass(frozen=True)
class Arm:
    """A method, and the settings in which it differs from the experiment's settings."""

    key: str
    name: str
    role: Role
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment, trained or not."""

    arm: Arm
    seed: int
    config: TrainConfig

    @property
    def label(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.config.run.output_dir))

    @property
    def lora(self) -> Path:
        return self.run.folder / LORA_FILE

    @property
    def is_finished(self) -> bool:
        """Whether the folder contains a result trained with these settings; open settings may have any value."""
        return self.run.is_finished and self._has_same_settings()

    @property
    def timed_steps(self) -> list[float]:
        """The seconds of each step that was trained with these settings, also of a run in progress."""
        return [event["seconds"] for event in self.run.steps()] if self._has_same_settings() else []

    @property
    def is_resumable(self) -> bool:
        """Whether the folder contains a checkpoint of a run with these settings."""
        return bool(self.run.checkpoints()) and self._has_same_settings()

    @property
    def last_step(self) -> int:
        """The last step of the finished run."""
        ending = self.run.ending()
        assert ending is not None
        return int(ending["step"])

    @property
    def files(self) -> dict[int, Path]:
        """The LoRA files of the run by step, the result last; of an unfinished run, the expected paths."""
        if self.is_finished:
            # Exclude checkpoints after the step chosen by held-out images, and those of a stop or a request, which
            # other runs do not have.
            points = self._points(self.last_step)
            saved = {int(folder.name.split("-")[1]): folder / LORA_FILE for folder in self.run.checkpoints()}
            return {**{step: file for step, file in saved.items() if step in points}, self.last_step: self.lora}
        files = {step: self.run.folder / f"checkpoint-{step}" / LORA_FILE for step in self._points(self.steps)}
        return {**files, self.steps: self.lora}

    @property
    def remaining_steps(self) -> int:
        """The number of steps still to be trained."""
        if self.is_finished:
            return 0
        done = int(self.run.checkpoints()[-1].name.split("-")[1]) if self.is_resumable else 0
        return self.steps - done

    @property
    def steps(self) -> int:
        """The number of steps of the run."""
        assert self.config.optim.max_train_steps is not None
        return self.config.optim.max_train_steps

    def request_stop(self) -> None:
        """Request a stop after the current step; repeat until the run ends, as a trainer clears earlier requests."""
        with suppress(OSError):  # Windows refuses while the trainer is deleting the file
            self.run.stop_file.touch()

    def _points(self, end: int) -> range:
        """The steps before `end` at which a checkpoint is saved."""
        return range(self.config.run.checkpointing_steps, end, self.config.run.checkpointing_steps)

    def _has_same_settings(self) -> bool:
        """Whether the run in the folder was trained with these settings; open settings may have any value."""
        if not is_made_with(self.run, self.config):
            return False
        planned, saved = self.config.to_dict(), self.run.config()
        return all(saved.get(name) == planned[name] for name in _FIXED_SETTINGS)


def parse_arm(text: str) -> Arm:
    """Parse `METHOD` or `METHOD:SETTING=VALUE,SETTING=VALUE`.

    Raises:
        ConfigError: The method or a setting is unknown, or the setting is shared by the whole experiment.
    """
    method, _, rest = text.partition(":")
    if method not in METHODS:
        names = ", ".join(METHODS)
        raise ConfigError(f"--arms: {text!r} must begin with one of {names}{why_removed('method', method)}")
    changes: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        name, equals, value = part.partition("=")
        reason = _refusal(method, name) if equals else "is not SETTING=VALUE"
        if reason:
            raise ConfigError(f"--arms: {part!r} in {text!r} {reason}")
        try:
            changes[name] = read_setting(name, value)
        except ConfigError as error:
            raise ConfigError(f"--arms {text}: {error}") from error
    return Arm(text, arm_name(method, changes), "arm", method, changes)


def arm_name(method: str, changes: Mapping[str, Any]) -> str:
    """The arm's name in the report."""
    parts = [f"average of {value}" if name == "members" else f"{name} {value}" for name, value in changes.items()]
    return ", ".join([METHODS[method].title, *parts])


def plan_runs(config: TrainConfig, arms: Sequence[Arm], seeds: Sequence[int], points: int) -> list[PlannedRun]:
    """Plan every run, seed by seed, in folders below `output_dir`; each run saves `points` checkpoints.

    Raises:
        ConfigError: The settings of an arm exclude each other or do not fit the base, or --max_train_steps is missing.
    """
    steps = config.optim.max_train_steps
    if steps is None:
        raise ConfigError("--max_train_steps is missing: give it, so that all arms train equally long")
    family = family_of(config.model)
    family.check_settings(config)
    out = Path(config.run.output_dir)
    planned = []
    for seed in seeds:
        for arm in arms:
            left_open = dict.fromkeys(settings_not_of(arm.method)) | cleared_by(arm.changes)
            values = {"seed": seed, "method": arm.method, **left_open, **arm.changes}
            arm_steps = int(values.get("max_train_steps", steps))
            values |= {
                "output_dir": str(run_folder(out, arm.key, seed)),
                "output_name": f"{out.name}-{slug(arm.key)}-{seed}",
                "checkpointing_steps": max(1, -(-arm_steps // points)),
                "checkpoints_total_limit": None,
                "resume_from_checkpoint": None,
            }
            try:
                planned.append(PlannedRun(arm, seed, config.replace(**values)))
                family.check_settings(planned[-1].config)
            except ConfigError as error:
                raise ConfigError(f"--arms {arm.key}: {error}") from error
    return planned


def run_folder(out: Path, arm: str, seed: int | str) -> Path:
    """The folder of a run in an experiment's folder, by the arm's key and the seed."""
    return out / slug(arm) / f"seed-{seed}"


def train_run(planned: PlannedRun, on_wait: Callable[[], None] | None = None) -> None:
    """Train a run in a subprocess by the command line, unless it is finished already.

    Args:
        on_wait: Called every few seconds while the run trains.

    Raises:
        RunError: The training fails.
    """
    folder = planned.run.folder
    label = planned.label
    if planned.is_finished:
        logger.info("%s: already trained in %s", label, folder)
        return
    logger.info("%s: %s", label, "resuming" if planned.is_resumable else "training")
    environment = {**os.environ, QUIET_VARIABLE: "1"}  # its log lines about the images are the same for all runs
    with subprocess.Popen(training_command(planned), env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait() if on_wait is None else _wait(process, on_wait)
        except KeyboardInterrupt:
            _stop_and_wait(planned, process)  # in case Ctrl-C has not reached it; it saves a checkpoint
            raise
    if code != 0:
        raise RunError(f"training {label} ended with exit code {code}; see its message above")


def _wait(process: subprocess.Popen[bytes], on_wait: Callable[[], None]) -> int:
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_WATCH_INTERVAL)
        on_wait()


def _stop_and_wait(planned: PlannedRun, process: subprocess.Popen[bytes]) -> None:
    """Request a stop until the run has ended."""
    while True:
        planned.request_stop()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_INTERVAL)
            return


def training_command(planned: PlannedRun) -> list[str]:
    """The command that trains or resumes a run; writes its settings to a file beside its folder."""
    folder, values = planned.run.folder, planned.config.to_dict()
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder.parent / f"{folder.name}.json"
    settings.write_text(json.dumps(portable(values), indent=2) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "flatlora_diffusion", "train", "--config", str(settings)]
    # The settings file may contain paths shortened to their names.
    command += [f"--{name}={value}" for name in settings_with("is_path") if (value := values[name])]
    return [*command, "--resume_from_checkpoint=latest"] if planned.is_resumable else command


def _refusal(method: str, name: str) -> str:
    """Why an arm of this method cannot change the setting; empty if it can."""
    if name in _SHARED_SETTINGS:
        return "is shared by the whole experiment"
    if method not in methods_with(name):
        return f"has no effect on {'plain ' if method == 'lora' else ''}{METHODS[method].title}"
    return ""
