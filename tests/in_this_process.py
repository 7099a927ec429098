"""Trainings of `compare` without processes of their own, which would import all libraries once for each."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import QUIET_VARIABLE


class InThisProcess:
    """In place of `subprocess.Popen`: the command line's own code here."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdout: int) -> None:
        assert (env.keys() - os.environ.keys(), stdout) == ({QUIET_VARIABLE}, subprocess.DEVNULL)
        assert command[1:3] == ["-m", "flatlora_diffusion"]
        self.code = main(list(command[3:]))

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait(self, timeout: float | None = None) -> int:
        return self.code
