"""Processes of a run that are copies of the test's own: a start costs nothing, all libraries are loaded already."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

KIND = "fork" if hasattr(os, "fork") else "spawn"  # Windows has to load all anew
LONGEST = 300.0  # seconds


def forked(said: Path, environment: Mapping[str, str], *runs: Sequence[str]) -> BaseProcess:
    """The training script with more in its environment, for the arguments of one run or of several in turn.

    All that it says goes into the file `said`.
    """
    context: Any = multiprocessing.get_context(KIND)
    process: BaseProcess = context.Process(target=_train, args=(said, environment, *map(list, runs)))
    process.start()
    return process


def ended(process: BaseProcess) -> int:
    """The exit code; negative for the signal that ended it."""
    process.join(LONGEST)
    assert process.exitcode is not None, f"the process did not end in {LONGEST:g} s"
    return process.exitcode


def _train(said: Path, environment: Mapping[str, str], *runs: list[str]) -> None:
    from flatlora_diffusion.commands.command_line import train_main

    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # pytest's own lead elsewhere, and so do the handlers of logs that were set up with them.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", buffering=1) for number in (1, 2))
    logging.root.handlers.clear()
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    code = 1
    try:
        code = max(train_main(arguments) for arguments in runs)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # not through pytest's own ends
