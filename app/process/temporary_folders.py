"""Temporary folders of the app; those of a killed app are removed at the next start."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "flatlora-"
_LOCK = ".lock"  # beside the folder; locked for as long as its app lives


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, readable by this user only and removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent.resolve() / f"{_PREFIX}{secrets.token_hex(8)}"
    try:
        with FileLock(_lock_of(folder)):
            folder.mkdir(mode=0o700)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        _remove_lock(folder)


def remove_stale_folders(parent: Path) -> None:
    """Remove this user's temporary folders in `parent` whose app was killed."""
    for lock_file in parent.glob(f"{_PREFIX}*{_LOCK}"):
        if not _is_own_file(lock_file):
            continue
        folder = lock_file.with_suffix("")
        with suppress(Timeout, OSError):
            with FileLock(lock_file).acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
            _remove_lock(folder)


def _remove_lock(folder: Path) -> None:
    """When it is not locked any more, as Windows wants it; of a folder that could not be removed it stays."""
    if not folder.exists():
        with suppress(OSError):
            _lock_of(folder).unlink()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _is_own_file(path: Path) -> bool:
    """Exclude links: in a shared folder other users could place links to files of this user."""
    with suppress(OSError):
        status = path.lstat()
        return not path.is_symlink() and (not hasattr(os, "getuid") or status.st_uid == os.getuid())
    return False
