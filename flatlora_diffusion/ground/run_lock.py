"""Whose folder it is: one run at a time writes into it. The lock ends with the process that holds it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flatlora_diffusion.config import ConfigError

logger = logging.getLogger(__name__)

_LOCK = ".lock"


@contextmanager
def alone_in(folder: Path, setting: str, waits: bool = False) -> Iterator[None]:
    """Hold `folder`, the value of `setting`, which is made if it is not there; gone again if nothing was put into it.

    Raises ConfigError when another process holds it, unless this one `waits` for it, and when it cannot be written.
    """
    is_new = not folder.exists()
    lock = FileLock(folder / _LOCK, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not waits:
                raise
            logger.info("waiting for another run that writes into %s", folder)
            lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"{setting}={str(folder)!r} belongs to another run that goes on: let it end, or give another folder"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{setting}={str(folder)!r} cannot be written: {reason}; give another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that is open; it stays there and does no harm
            (folder / _LOCK).unlink()
        lock.release()
        if is_new:
            with suppress(OSError):
                folder.rmdir()
