"""A disk that is full, or a folder that turns read-only, from one moment on and until it is put right again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.short_run import Process
from benchmarks.soak_judge import FULL

IS_ROOT = sys.platform == "linux" and os.geteuid() == 0
HAS_LIMITS = sys.platform == "linux"
MIB = 16
LIMIT = 32 * 1024  # bytes: below a LoRA file's and a checkpoint's, above a log's
SECONDS_TO_REMOUNT = 60.0  # while a file is open; long, because other processes may slow the run that has it


def means() -> dict[str, str]:
    """What a full disk and a read-only folder are on this machine; nothing for what cannot be had."""
    if IS_ROOT:
        return {
            "full disk": f"a tmpfs of {MIB} MiB, filled",
            "read-only": "a tmpfs, covered by a read-only mount of itself",
        }
    limit = {"full disk": f"RLIMIT_FSIZE of {LIMIT} bytes"} if HAS_LIMITS else {}
    return limit | ({} if sys.platform == "win32" else {"read-only": "a run folder of mode 0555"})


@contextmanager
def own_disk(folder: Path) -> Iterator[None]:
    """`folder` is a small disk of its own while this is open; only for root on Linux."""
    if not IS_ROOT:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MIB}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        while os.path.ismount(folder):  # more than once if it is still read-only
            subprocess.run(["umount", "--lazy", folder], check=True)


def break_disk(kind: str, disk: Path, run: Path, process: Process) -> None:
    """From now on nothing can be written to `disk`; without the means for that, no large file, or not into `run`."""
    if IS_ROOT and kind == FULL:
        fill(disk / "ballast")
    elif IS_ROOT:
        # A disk on which a file is open, such as a run's lock, cannot be mounted anew; but it can be mounted again on
        # top of itself, and this mount can.
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        _make_read_only(disk)
    elif kind == FULL:
        import resource

        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    else:
        run.chmod(0o555)


def mend_disk(kind: str, disk: Path, run: Path) -> None:
    """All can be written again; the limit went with its process."""
    if IS_ROOT and kind == FULL:
        (disk / "ballast").unlink()
    elif IS_ROOT:
        subprocess.run(["umount", "--lazy", disk], check=True)
    elif kind != FULL:
        run.chmod(0o755)


def fill(ballast: Path) -> None:
    handle = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (2**20, 2**12):
            try:
                while True:
                    os.write(handle, bytes(size))
            except OSError:
                pass  # it is full, for pieces of this size
    finally:
        os.close(handle)


def _make_read_only(disk: Path) -> None:
    end = time.monotonic() + SECONDS_TO_REMOUNT
    command = ["mount", "-o", "remount,bind,ro", str(disk)]
    while subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        if time.monotonic() > end:
            raise TimeoutError(f"{disk} stays in use, so it cannot be made read-only")
