"""Paths of runs and of their launches, and a fingerprint of their state."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..process.file_cache import FileCache, Stamp, is_stable, stamp_of
from ..process.launch import Launch
from .names import folder_of, private_name, run_id_of, run_ids, safe_name


@dataclass(frozen=True)
class Fingerprint:
    """Equal for two times if nothing has changed between them: file stamps, and the ids of running runs."""

    stamp: Stamp
    living: tuple[str, ...]


@dataclass(frozen=True)
class _Watched:
    run_id: str
    launch: Launch | None
    files: tuple[str, ...]


class RunPaths:
    """The paths of runs below `folder`, and of the app's launches below `launches`."""

    def __init__(self, folder: Path, launches: Path) -> None:
        self.folder, self.launches = folder, launches
        self._ids: FileCache[list[str]] = FileCache()
        self._watched: FileCache[list[_Watched]] = FileCache()
        self._last: FileCache[Launch | None] = FileCache()

    def ids(self) -> list[str]:
        """All run folders."""
        return self._ids.get("runs", self._walk)

    def launched(self) -> list[str]:
        """The runs that the app has started, including those without a folder yet."""
        return self._ids.get("launched", self._list_launched)

    def last_launch(self, run_id: str) -> Launch | None:
        """The app's last start of the run; None for a run that only command lines have started."""
        private = self.private(run_id)

        def make() -> tuple[Launch | None, Iterable[str]]:
            numbers = [int(path.name.split("-")[1]) for path in private.glob("launch-*")]
            last = Launch(private / f"launch-{max(numbers)}") if numbers else None
            return last, [str(private)]

        return self._last.get(run_id, make)

    def next_launch(self, run_id: str) -> Launch:
        """The run's next start; its folder does not exist yet."""
        last = self.last_launch(run_id)
        number = 1 if last is None else int(last.folder.name.split("-")[1]) + 1
        return Launch(self.private(run_id) / f"launch-{number}")

    def private(self, run_id: str) -> Path:
        """The folder of the run's launches. Raises ConfigError for an id outside of the runs folder."""
        folder_of(self.folder, run_id)
        return self.launches / private_name(run_id)

    def reserve(self, name: str) -> str:
        """Reserve the id of a new run: `name`, with a number if it is taken."""
        base = run_id = safe_name(name)
        number = 2
        while not self._is_reserved_now(run_id):
            run_id, number = f"{base}-{number}", number + 1
        return run_id

    def release(self, run_id: str) -> None:
        """Return an unused id."""
        private = self.private(run_id)
        if private.is_dir() and not any(private.iterdir()):
            private.rmdir()

    def files(self, run_id: str) -> tuple[str, ...]:
        """The paths of which at least one changes with the run, without the files of a running launch."""
        run, private = os.path.join(self.folder, run_id), os.path.join(self.launches, private_name(run_id))
        launch = self.last_launch(run_id)
        started = () if launch is None else (str(launch.folder),)
        return run, os.path.join(run, "config.json"), os.path.join(run, "events.jsonl"), private, *started

    def fingerprint(self, files: Iterable[str], run_ids: Iterable[str] | None = None) -> Fingerprint | None:
        """The fingerprint of `files` and all runs; None shortly after a change.

        Args:
            run_ids: limit it to these runs, and include each of their steps.
        """
        begun = time.time_ns()
        living, paths = [], list(files)
        for one in self._watched.get("all", self._watch_all) if run_ids is None else map(self._watch, run_ids):
            if one.launch is None or not one.launch.is_running():
                paths += one.files
                continue
            living.append(one.run_id)
            if run_ids is not None:
                paths += [*one.files, str(one.launch.log_file)]
        stamp = stamp_of(paths)
        return Fingerprint(stamp, tuple(living)) if is_stable(stamp, begun) else None

    def _watch(self, run_id: str) -> _Watched:
        return _Watched(run_id, self.last_launch(run_id), self.files(run_id))

    def _watch_all(self) -> tuple[list[_Watched], Iterable[str] | None]:
        watched = [self._watch(run_id) for run_id in dict.fromkeys([*self.ids(), *self.launched()])]
        folders, starts = self._ids.paths("runs"), self._ids.paths("launched")
        return watched, (*folders, *starts) if folders and starts else None  # without those that settle still

    def _is_reserved_now(self, run_id: str) -> bool:
        private = self.private(run_id)
        if folder_of(self.folder, run_id).exists():
            return False
        self.launches.mkdir(parents=True, exist_ok=True)
        try:
            private.mkdir()
        except FileExistsError:
            return False
        return True

    def _walk(self) -> tuple[list[str], Iterable[str]]:
        folders: list[Path] = []
        found = list(run_ids(self.folder, folders))
        return found, map(str, folders)

    def _list_launched(self) -> tuple[list[str], Iterable[str]]:
        private = [path.name for path in self.launches.iterdir()] if self.launches.is_dir() else []
        found = [run_id for run_id in map(run_id_of, private) if self.last_launch(run_id) is not None]
        return found, [str(self.launches), *(str(self.launches / name) for name in private)]
