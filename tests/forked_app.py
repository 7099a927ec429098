"""Apps that are copies of a process with all libraries loaded: to import them takes ten seconds of a core.

The copied process does nothing else (multiprocessing's fork server), so no thread of a test is in the copies.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
ROOT = Path(__file__).parents[1]


class ForkedApp:
    """`python -m app ARGUMENTS`, with as much of subprocess.Popen's interface as `RunningApp` uses."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["forked_app_libraries"])
        # The fork server finds what it loads by PYTHONPATH alone.
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(paths)}):
            self._process = context.Process(target=_run, args=(list(arguments), dict(environment), log))
            self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, timeout: float) -> int | None:
        self._process.join(timeout)
        return self.poll()


def _run(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from app.__main__ import main

    sys.exit(main(arguments))
