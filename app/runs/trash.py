"""Deleted runs: moved into a folder inside the runs folder, with all that the app keeps of them, until undone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flatlora_diffusion.config import ConfigError

from ..process.database import Database, DeletedRun
from .names import folder_of, private_name, size_of


class Trash:
    """The trash in `folder`, of runs in `root` whose private files are in `private`."""

    def __init__(self, folder: Path, root: Path, private: Path, store: Database) -> None:
        self._folder, self._root, self._private, self._store = folder, root, private, store

    def delete(self, run_id: str) -> str:
        """Move the run into the trash; returns the key that undoes it."""
        key, number = private_name(run_id), 2
        while (self._folder / key).exists():
            key, number = f"{private_name(run_id)}%%{number}", number + 1
        place = self._folder / key
        place.mkdir(parents=True)
        self._store.add_deleted(key, run_id)  # first, so that a crash in between can be undone
        _move(self._root / run_id, place / "run")
        _move(self._private / private_name(run_id), place / "private")
        return key

    def undo(self, key: str) -> str:
        """Move the run back; returns its id. Raises ConfigError when it is not there or its place is taken."""
        run_id = self._entry(key).run
        folder = folder_of(self._root, run_id)
        place, private = self._folder / key, self._private / private_name(run_id)
        if folder.exists() or private.exists():
            raise ConfigError(f"there is another run {run_id!r} now; delete or move that one first")
        _move(place / "run", folder)
        _move(place / "private", private)
        self._store.forget_deleted(key)
        shutil.rmtree(place)
        return run_id

    def delete_for_good(self, key: str) -> None:
        """Remove a deleted run from the disk. Raises ConfigError when it is not in the trash."""
        self._entry(key)
        shutil.rmtree(self._folder / key)
        self._store.forget_deleted(key)

    def entries(self) -> list[DeletedRun]:
        """The deleted runs that are still there, the last deleted first."""
        return [entry for entry in self._store.deleted() if (self._folder / entry.id).is_dir()]

    def size(self) -> int:
        """Bytes on the disk."""
        return size_of(self._folder)

    def _entry(self, key: str) -> DeletedRun:
        entry = next((entry for entry in self.entries() if entry.id == key), None)
        if entry is None:
            raise ConfigError("that run is not in the trash any more")
        return entry


def _move(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
