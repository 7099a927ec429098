"""Arms times seeds, trained as one experiment: the settings and the folder of each run, trained once, resumed if cut.

All runs of a seed share every setting but those that their arm is about.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.storage.saved_config import portable
from flatlora_diffusion.training.resolve_config import is_made_with

logger = logging.getLogger(__name__)

Role = Literal["arm", "null"]

# An arm must not move these: seeds pair the runs, folders and intervals belong to the experiment, and runs of another
# base, of other images or in another precision cannot be measured alike.
_OURS = {*settings_with("is_shared"), *(item.name for item in fields(ModelConfig))}
# What a finished run must share beyond what makes its steps: its end, its checkpoints, the precision of its file.
_SHAPE = ("max_train_steps", "checkpointing_steps", "save_dtype")


ASK_EVERY = 1.0  # seconds, until a run that is to stop has ended


@dataclass(frozen=True)
class Arm:
    """A method, and the settings in which it differs from the experiment's own."""

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
        """Whether the folder has a result made with these settings (those left open may have any value)."""
        ending = self.run.ending()
        return ending is not None and ending["event"] == "finished" and self.lora.is_file() and self._is_mine()

    @property
    def is_begun(self) -> bool:
        """Whether the folder has a checkpoint of a run with these settings to go on from."""
        return bool(self.run.checkpoints()) and self._is_mine()

    @property
    def last_step(self) -> int:
        """How many steps the finished run took."""
        ending = self.run.ending()
        assert ending is not None
        return int(ending["step"])

    @property
    def files(self) -> dict[int, Path]:
        """The LoRA files along the run by their steps, the result last; before it is trained, where they will be."""
        if self.is_finished:
            # Those after the one that held-out images have chosen are no part of the way to it, and those of a stop or
            # a request no part that other runs have too.
            points = self._points(self.last_step)
            made = {int(one.name.split("-")[1]): one / LORA_FILE for one in self.run.checkpoints()}
            return {**{step: file for step, file in made.items() if step in points}, self.last_step: self.lora}
        files = {step: self.run.folder / f"checkpoint-{step}" / LORA_FILE for step in self._points(self.steps)}
        return {**files, self.steps: self.lora}

    @property
    def steps_left(self) -> int:
        """How many steps are still to be trained."""
        if self.is_finished:
            return 0
        done = int(self.run.checkpoints()[-1].name.split("-")[1]) if self.is_begun else 0
        return self.steps - done

    @property
    def steps(self) -> int:
        """How many steps the run takes."""
        assert self.config.optim.max_train_steps is not None
        return self.config.optim.max_train_steps

    def ask_to_stop(self) -> None:
        """Ask for a stop after the step it is at. A trainer forgets what comes before its first: ask until it ends."""
        with suppress(OSError):  # Windows refuses while it is being deleted; the next time comes
            self.run.stop_file.touch()

    def _points(self, end: int) -> range:
        """The steps before the end after which a checkpoint is due."""
        return range(self.config.run.checkpointing_steps, end, self.config.run.checkpointing_steps)

    def _is_mine(self) -> bool:
        """Whether the run in the folder was made with these settings; what they leave open may have any value."""
        if not is_made_with(self.run, self.config):
            return False
        wanted, saved = self.config.to_dict(), self.run.config()
        return all(saved.get(name) == wanted[name] for name in _SHAPE)


def parse_arm(text: str) -> Arm:
    """The arm `METHOD` or `METHOD:SETTING=VALUE,SETTING=VALUE`.

    Raises ConfigError for an unknown method or setting, and for a setting that the experiment itself sets.
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
    """What the report calls the arm."""
    shown = ", ".join(
        f"average of {value}" if name == "members" else f"{name} {value}" for name, value in changes.items()
    )
    return METHODS[method].title + (f", {shown}" if shown else "")


def plan(config: TrainConfig, arms: Sequence[Arm], seeds: Sequence[int], points: int) -> list[PlannedRun]:
    """Every run, seed by seed, below `output_dir`; each saves `points` checkpoints.

    Raises ConfigError for settings of an arm that exclude each other, before anything is trained.
    """
    steps = config.optim.max_train_steps
    if steps is None:
        raise ConfigError("--max_train_steps is missing: give the steps, so that all arms have the same")
    out = Path(config.run.output_dir)
    planned = []
    for seed in seeds:
        for arm in arms:
            left_open = dict.fromkeys(settings_not_of(arm.method)) | cleared_by(arm.changes)
            values = {"seed": seed, "method": arm.method, **left_open, **arm.changes}
            arm_steps = int(values.get("max_train_steps", steps))
            values |= {
                "output_dir": str(folder_of(out, arm.key, seed)),
                "output_name": f"{out.name}-{_slug(arm.key)}-{seed}",
                "checkpointing_steps": max(1, -(-arm_steps // points)),
                "checkpoints_total_limit": None,
                "resume_from_checkpoint": None,
            }
            try:
                planned.append(PlannedRun(arm, seed, config.replace(**values)))
            except ConfigError as error:
                raise ConfigError(f"--arms {arm.key}: {error}") from error
    return planned


def folder_of(out: Path, arm: str, seed: int | str) -> Path:
    """Where the run of an arm, by its key, and of a seed lies in an experiment's folder."""
    return out / _slug(arm) / f"seed-{seed}"


def train_planned(planned: PlannedRun) -> None:
    """Train one run with the command line's own code in a process of its own, unless it is there already.

    Raises RunError when it does not end well.
    """
    folder = planned.run.folder
    label = planned.label
    if planned.is_finished:
        logger.info("%s: already trained in %s", label, folder)
        return
    logger.info("%s: %s", label, "going on" if planned.is_begun else "training")
    environment = {**os.environ, QUIET_VARIABLE: "1"}  # what it would say of the images is the same for all runs
    with subprocess.Popen(training_command(planned), env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _stop(planned, process)  # if Ctrl-C has not reached it: it saves what it needs to go on
            raise
    if code != 0:
        raise RunError(f"training {label} ended with exit code {code}; its message is above")


def _stop(planned: PlannedRun, process: subprocess.Popen[bytes]) -> None:
    """Returns when the run has ended."""
    while True:
        planned.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            process.wait(ASK_EVERY)
            return


def training_command(planned: PlannedRun) -> list[str]:
    """What trains a run, or what is left of it, with the settings in a file beside its folder."""
    folder, values = planned.run.folder, planned.config.to_dict()
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder.parent / f"{folder.name}.json"
    settings.write_text(json.dumps(portable(values), indent=2) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "flatlora_diffusion", "train", "--config", str(settings)]
    # The saved paths may be cut to their names.
    command += [f"--{name}={value}" for name in settings_with("is_path") if (value := values[name])]
    return [*command, "--resume_from_checkpoint=latest"] if planned.is_begun else command


def _refusal(method: str, name: str) -> str:
    """Why an arm of this method cannot have the setting; nothing if it can."""
    if name in _OURS:
        return "is the same for the whole experiment"
    if method not in methods_with(name):
        return f"means nothing for {'plain ' if method == 'lora' else ''}{METHODS[method].title}"
    return ""


def _slug(key: str) -> str:
    """An arm's key as a folder's name on any system."""
    return re.sub(r"[^\w.-]+", "-", key)
