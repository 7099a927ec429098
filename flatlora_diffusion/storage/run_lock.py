"""A lock for a folder, so that only one run at a time writes into it; released when its process ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.storage.atomic_io import explain_write_errors, remove_partial_files

logger = logging.getLogger(__name__)

_LOCK = ".lock"


@contextmanager
def lock_folder(folder: Path, setting: str, wait: bool = False) -> Iterator[None]:
    """Lock `folder`, the value of `setting`, and delete temporary files of killed processes in it.

    The folder is created if needed, and removed again if it stays empty.

    Args:
        wait: wait for the process that holds the lock.

    Raises:
        ConfigError: another process holds the lock and `wait` is False, or the folder cannot be written.
    """
    is_new = not folder.exists()
    lock = FileLock(folder / _LOCK, thread_local=False)
    with explain_write_errors(folder, setting):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _acquire(lock, timeout=0)
        except Timeout as error:
            if not wait:
                reason = "is in use by another run: wait until it ends, or give another folder"
                raise ConfigError(f"{setting}={str(folder)!r} {reason}") from error
            logger.info("waiting for another run that writes into %s", folder)
            _acquire(lock, timeout=-1)
    remove_partial_files(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file; a leftover lock file does no harm
            (folder / _LOCK).unlink()
        lock.release()
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def _acquire(lock: FileLock, timeout: float) -> None:
    """Acquire the lock. If its previous holder has just removed the file, the lock excludes nobody: acquire again."""
    while True:
        lock.acquire(timeout=timeout)
        if Path(lock.lock_file).exists():
            return
        lock.release()
