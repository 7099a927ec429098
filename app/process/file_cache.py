"""Values computed from files, cached until a file changes by modification time or size; no file is opened."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

from flatlora_diffusion.storage.atomic_io import file_sha256

Value = TypeVar("Value")
Stamp = tuple[tuple[int, int, int] | None, ...]
"""(time in ns, bytes, the system's number) of each path; None for one that is not there."""

# What has just changed may change again within the same tick of the file system's clock, which tells two seconds apart
# at the worst.
_STABLE_AFTER_NS = 2 * 10**9


def stamp_of(paths: Iterable[str]) -> Stamp:
    return tuple(map(_stamp, paths))


def is_stable(stamp: Stamp, now_ns: int) -> bool:
    """Whether the last change is old enough that another change would alter the stamp."""
    return max((one[0] for one in stamp if one is not None), default=0) < now_ns - _STABLE_AFTER_NS


class FileCache(Generic[Value]):
    """Values by key. Safe under several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[Hashable, tuple[Value, tuple[str, ...], Stamp]] = {}

    def get(self, key: Hashable, make: Callable[[], tuple[Value, Iterable[str] | None]]) -> Value:
        """The cached value of `key`.

        Args:
            make: computes the value and the paths that it depends on; with None for the paths it is not cached.
        """
        kept = self._values.get(key)
        if kept is not None and stamp_of(kept[1]) == kept[2]:
            return kept[0]
        begun = time.time_ns()
        value, made_of = make()
        paths = tuple(made_of or ())
        stamp = stamp_of(paths)
        with self._lock:
            if made_of is not None and is_stable(stamp, begun):
                self._values[key] = (value, paths, stamp)
            else:
                self._values.pop(key, None)
        return value

    def paths(self, key: Hashable) -> tuple[str, ...]:
        """The paths that a cached value depends on; empty if it is not cached."""
        kept = self._values.get(key)
        return () if kept is None else kept[1]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, read again only when it has changed."""
    status = path.stat()
    return _hash(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _hash(path: Path, changed: int, size: int) -> str:
    return file_sha256(path)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
