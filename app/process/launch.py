"""One start of a heavy command: its folder holds the command, the log and, in the end, the exit code.

command.json     the argument list, and the file that asks the command to stop
settings.json    a training's settings as they were given
log.txt          all that the command prints
supervisor.json, trainer.json   which processes they are
stop             asks for a stop, or for one at once; the supervisor passes it on
exit.json        how it ended; written by the supervisor, so that it is known even if the app was not there
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatlora_diffusion.storage.atomic_io import write_json

from ..settings import AUTH_VARIABLE
from .json_file import read_json
from .processes import identity, is_alive, kill_tree

LOG_LINES = 40
IMMEDIATELY = "at once"
_LOG_BYTES = 2**20
_START_SECONDS = 10  # from the command's file to the supervisor's


@dataclass(frozen=True)
class Ending:
    """The end of a command: its exit code, whether a stop was requested, and the time (seconds since 1970)."""

    code: int
    was_asked: bool
    time: float


class Launch:
    """One start, accessed through its folder only: any process may read it, request a stop, or kill it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command_file = folder / "command.json"
        self.settings_file = folder / "settings.json"
        self.log_file = folder / "log.txt"
        self.supervisor_file = folder / "supervisor.json"
        self.trainer_file = folder / "trainer.json"
        self.stop_file = folder / "stop"
        self.exit_file = folder / "exit.json"

    def start(self, arguments: Sequence[str], stop_file: Path | None = None) -> None:
        """Run `python arguments...` under a supervisor that outlives this process and its terminal.

        Args:
            stop_file: the file by which the command is asked to stop; without it a stop terminates the command.
        """
        command = {"arguments": list(arguments), "stop_file": None if stop_file is None else str(stop_file)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.command_file, command)
        environment = {name: value for name, value in os.environ.items() if name != AUTH_VARIABLE}
        environment |= {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "1"}
        with open(self.log_file, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.supervise", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                **_detached(),
            )
        write_json(self.supervisor_file, identity(process.pid))
        threading.Thread(target=process.wait, daemon=True).start()  # else it would stay a zombie

    def is_running(self) -> bool:
        """Whether the command or its supervisor lives, or was started a moment ago."""
        if self.exit_file.exists():
            return False
        if is_alive(read_json(self.supervisor_file)) or is_alive(read_json(self.trainer_file)):
            return True
        is_new = not self.supervisor_file.exists() and self.command_file.exists()
        return is_new and time.time() - self.command_file.stat().st_mtime < _START_SECONDS

    def ending(self) -> Ending | None:
        """None while the command runs, or if both the supervisor and the command were killed."""
        values = read_json(self.exit_file)
        return Ending(**values) if values else None

    def settings(self) -> dict[str, Any]:
        return read_json(self.settings_file)

    def ask_to_stop(self) -> None:
        self.stop_file.touch()

    def kill(self) -> None:
        """Kill the command and count this as a requested stop. The supervisor still writes `exit.json`."""
        self.stop_file.write_text(IMMEDIATELY)
        kill_tree(read_json(self.trainer_file))

    def log(self, lines: int = LOG_LINES) -> list[str]:
        """The last lines of the log; of a progress bar only its last state."""
        if not self.log_file.exists():
            return []
        with open(self.log_file, "rb") as file:
            file.seek(max(0, self.log_file.stat().st_size - _LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
        last_states = ([state for state in line.split("\r") if state.strip()] for line in text.split("\n"))
        return [states[-1] for states in last_states if states][-lines:]


def _detached() -> dict[str, Any]:
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}
