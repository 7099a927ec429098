"""Limits of size and age for uploads that the app has not processed yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 2 * 2**30  # of all uploads that nothing was made of yet
MAX_AGE_SECONDS = 60 * 60
_SAFE_SECONDS = 10 * 60  # what is younger may be in use, or still growing


@dataclass
class IncomingUpload:
    """An upload that is being received."""

    bytes_left: int


class UploadLimit:
    """The folder into which Gradio receives uploads. Processed uploads are stored elsewhere."""

    def __init__(self, folder: Path, most_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._most_bytes, self._clock = most_bytes, clock
        self._coming: list[IncomingUpload] = []

    @contextmanager
    def receive(self, size: int) -> Iterator[IncomingUpload | None]:
        """Register an upload of `size` bytes while it is received; None without room. Removes old uploads."""
        coming = IncomingUpload(size)
        if not self._has_room(coming):
            yield None
            return
        self._coming.append(coming)
        try:
            yield coming
        finally:
            self._coming.remove(coming)

    def sweep(self) -> None:
        """Remove the uploads that are older than KEPT_SECONDS."""
        for path, changed, _ in self._files():
            if changed < self._clock() - MAX_AGE_SECONDS:
                self._remove(path)

    def _has_room(self, coming: IncomingUpload) -> bool:
        files = sorted(self._files(), key=lambda file: file[1])
        room = self._most_bytes - coming.bytes_left - sum(one.bytes_left for one in self._coming)
        over = sum(size for *_, size in files) - room
        for path, changed, size in files:
            if over <= 0 or changed > self._clock() - _SAFE_SECONDS:
                break
            self._remove(path)
            over -= size
        return over <= 0

    def _files(self) -> list[tuple[Path, float, int]]:
        """(path, time of the last change in seconds, bytes) of each upload, including incomplete ones."""
        found = []
        for path in self.folder.rglob("*"):
            with suppress(OSError):
                status = path.lstat()
                if not path.is_dir():
                    found.append((path, status.st_mtime, status.st_size))
        return found

    def _remove(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink()
            if path.parent != self.folder:
                path.parent.rmdir()
