"""`python -m app.process.supervise FOLDER`: run the command of a launch, pass on a stop, keep its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from flatlora_diffusion.storage.atomic_io import write_json

from .json_file import read_json
from .launch import IMMEDIATELY, Launch
from .processes import identity, kill_tree

_POLL_SECONDS = 0.2
_NICENESS = 10  # of 19; a page is answered at once, and on an idle computer nothing is slower


def main(folder: Path) -> None:
    """Returns when the command has ended and its `exit.json` is written."""
    launch = Launch(folder)
    command = read_json(launch.command_file)
    stop_file = None if command["stop_file"] is None else Path(command["stop_file"])
    _give_way()
    process = subprocess.Popen([sys.executable, *command["arguments"]], stdin=subprocess.DEVNULL)
    write_json(launch.trainer_file, identity(process.pid))
    while process.poll() is None:
        if launch.stop_file.exists():
            if launch.stop_file.read_text() == IMMEDIATELY:
                kill_tree(identity(process.pid))
            else:
                _pass_on(stop_file, process)
        time.sleep(_POLL_SECONDS)
    was_asked = launch.stop_file.exists()
    if stop_file is not None:
        stop_file.unlink(missing_ok=True)
    write_json(launch.exit_file, {"code": process.returncode, "was_asked": was_asked, "time": time.time()})


def _give_way() -> None:
    """Lower the priority of this process and its children, so that the app stays responsive."""
    if sys.platform == "win32":
        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
    else:
        os.nice(_NICENESS)


def _pass_on(stop_file: Path | None, process: subprocess.Popen[bytes]) -> None:
    """A trainer forgets stop files from before its first step, so the file is put there again until it ends."""
    if stop_file is None:
        process.terminate()
        return
    with suppress(OSError):  # before its folder is there, or on Windows while it is being deleted; the next time comes
        stop_file.touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
