"""Whose folder it is: one run at a time writes into it. The lock ends with the process that holds it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.storage.atomic_io import remove_half_written, writing_into

logger = logging.getLogger(__name__)

_LOCK = ".lock"


@contextmanager
def alone_in(folder: Path, setting: str, waits: bool = False) -> Iterator[None]:
    """Hold `folder`, the value of `setting`, which is made if it is not there; gone again if nothing was put into it.
    What others have left half-written in it is removed.

    Raises ConfigError when another process holds it, unless this one `waits` for it, and when it cannot be written.
    """
    is_new = not folder.exists()
    lock = FileLock(folder / _LOCK, thread_local=False)
    with writing_into(folder, setting):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _acquire(lock, timeout=0)
        except Timeout as error:
            if not waits:
                owner = "belongs to another run that goes on: let it end, or give another folder"
                raise ConfigError(f"{setting}={str(folder)!r} {owner}") from error
            logger.info("waiting for another run that writes into %s", folder)
            _acquire(lock, timeout=-1)
    remove_half_written(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that is open; it stays there and does no harm
            (folder / _LOCK).unlink()
        lock.release()
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _acquire(lock: FileLock, timeout: float) -> None:
    """Hold the lock's file. One that its last holder has removed meanwhile keeps nobody out, so it is made anew."""
    while True:
        lock.acquire(timeout=timeout)
        if Path(lock.lock_file).exists():
            return
        lock.release()
