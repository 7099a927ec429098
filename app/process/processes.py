"""Living processes: those with a saved identity, and trainers started from a command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from flatlora_diffusion.config import ConfigError, RunConfig, preset_file

from .json_file import read_json

_CLOCK_STEPS_SECONDS = 2  # a process's start may be told a little differently when the clock is set meanwhile
_SCRIPT = "train_dreambooth_flatlora.py"
_COMMANDS = ("flatlora", "flatlora.exe")  # what pip makes of our entry point


def identity(pid: int) -> dict[str, Any]:
    """Identify a process beyond its reusable number, as JSON; empty for an ended process."""
    try:
        return {"pid": pid, "created": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:
        return {}


def is_alive(remembered: dict[str, Any]) -> bool:
    """Whether the process of this identity still runs."""
    return process_of(remembered) is not None


def process_of(remembered: dict[str, Any]) -> psutil.Process | None:
    """The living process of this identity."""
    if not remembered:
        return None
    try:
        process = psutil.Process(remembered["pid"])
        is_same = abs(process.create_time() - remembered["created"]) < _CLOCK_STEPS_SECONDS
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def kill_tree(remembered: dict[str, Any]) -> None:
    """Kill the process and its descendants."""
    process = process_of(remembered)
    if process is None:
        return
    for one in [*process.children(recursive=True), process]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue


class Trainers:
    """All trainers of this machine, found by their command lines at most once a second."""

    def __init__(self) -> None:
        self._found: dict[Path, dict[str, Any]] = {}
        self._looked: float | None = None

    def is_training_in(self, folder: Path) -> bool:
        """Whether a living trainer writes its run into `folder`."""
        if self._looked is None or time.monotonic() - self._looked > 1:
            self._found = _output_folders()
            self._looked = time.monotonic()
        return is_alive(self._found.get(folder.resolve(), {}))


def _output_folders() -> dict[Path, dict[str, Any]]:
    """The identity of each trainer by the folder that it writes to."""
    trainers = {}
    for process in psutil.process_iter(["cmdline"]):
        arguments = _training_arguments(process.info["cmdline"] or [])
        if arguments is None:
            continue
        try:
            cwd = Path(process.cwd())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        trainers[(cwd / _output_dir(arguments, cwd)).resolve()] = identity(process.pid)
    return trainers


def _training_arguments(command: Sequence[str]) -> list[str] | None:
    """The settings in a command line that trains; None for other command lines."""
    for place, part in enumerate(command):
        if Path(part).name == _SCRIPT:
            return list(command[place + 1 :])
        if part == "-m" and list(command[place + 1 : place + 3]) == ["flatlora_diffusion", "train"]:
            return list(command[place + 3 :])
        if Path(part).name in _COMMANDS and list(command[place + 1 : place + 2]) == ["train"]:
            return list(command[place + 2 :])
    return None


def _output_dir(arguments: list[str], cwd: Path) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output_dir", "--output-dir")
    parser.add_argument("--config")
    parser.add_argument("--preset")
    try:
        given, _ = parser.parse_known_args(arguments)
        preset = read_json(preset_file(given.preset)) if given.preset else {}
    except (argparse.ArgumentError, ConfigError):
        return RunConfig().output_dir
    config = read_json(cwd / given.config) if given.config else {}
    return str(given.output_dir or config.get("output_dir") or preset.get("output_dir") or RunConfig().output_dir)
