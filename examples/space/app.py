"""The app as a Space: the runs beside this file to compare and vote on, and nothing to train.

`python -m examples.space.app` starts it in a checkout, with the flags of `flatlora app` behind it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from flatlora_diffusion.commands.command_line import main

RUNS = Path(__file__).resolve().parent / "runs"
# A Space must listen on all addresses of its container, at this port, for the platform to reach it. `flatlora app` by
# itself listens on 127.0.0.1. The platform's own pages show a Space in a frame.
PLACE = ("--host", "0.0.0.0", "--port", "7860", "--framing_site", "https://huggingface.co")


def host_names() -> list[str]:
    """The names that requests come with: the Space's, and the container's address in case the platform looks there."""
    names = [os.environ.get("SPACE_HOST", "")]
    with suppress(OSError):
        names.append(socket.gethostbyname(socket.gethostname()))
    return [name for name in names if name]


def flags(runs: Path) -> list[str]:
    """The command line of a read-only app on `runs`."""
    hosts = [part for name in host_names() for part in ("--allowed_host", name)]
    return ["--read_only", "--runs_dir", str(runs), *PLACE, *hosts]


if __name__ == "__main__":
    # In what Gradio takes for a Space it loads fonts of Google, asks the hub about the Space and watches its files.
    os.environ.pop("SYSTEM", None)
    with tempfile.TemporaryDirectory() as folder:
        # Pictures and votes go beside the runs, and with the Space's disk when it restarts.
        copy = Path(shutil.copytree(RUNS, Path(folder, "runs")))
        sys.exit(main(["app", *flags(copy), *sys.argv[1:]]))
