"""What every tab works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from app.jobs import JobQueue
from app.places import Places
from app.runs import RunStore
from app.settings import AppSettings
from app.uploads import Uploads


@dataclass(frozen=True)
class AppContext:
    """One app: its settings, the runs below its runs folder, their queue, the uploads of its sessions, and the places
    that settings from the browser may name.
    """

    settings: AppSettings
    runs: RunStore
    queue: JobQueue
    uploads: Uploads
    places: Places


def make_context(settings: AppSettings) -> AppContext:
    """The context of an app with `settings`; the queue is not started yet."""
    settings.runs_folder.mkdir(parents=True, exist_ok=True)
    runs = RunStore(settings.runs_folder)
    uploads = Uploads(settings.uploads_folder)
    private, data = (list(map(Path, folders)) for folders in (settings.private, settings.data_dir))
    places = Places(runs.folder, private, uploads.frozen, data)
    return AppContext(settings, runs, JobQueue(runs), uploads, places)
