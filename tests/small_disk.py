"""A small disk of its own for a test: a tmpfs, which only root on Linux may mount."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """`folder`, made if need be, is a disk of `kib` KiB while this is open; skips the test where none can be had."""
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("a tmpfs is mounted on Linux only")
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        while os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


_BLOCK = bytes(4096)


class SmallDisk:
    """The disk at `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._ballast = place / "ballast"

    def fill(self) -> None:
        """Leave no room for a single byte more."""
        file = os.open(self._ballast, os.O_CREAT | os.O_WRONLY)
        try:
            while True:
                os.write(file, _BLOCK)
        except OSError:
            assert shutil.disk_usage(self.place).free == 0
        finally:
            os.close(file)

    def free(self) -> None:
        """Give back what `fill` has taken."""
        self._ballast.unlink()

    def empty(self) -> None:
        """Remove all that is on it."""
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def mounted(place: Path, megabytes: int = 32) -> Iterator[SmallDisk]:
    """A small disk in the folder `place`."""
    with small_disk(place, 1024 * megabytes) as disk:
        yield SmallDisk(disk)
