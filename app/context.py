"""What every tab works with."""

from __future__ import annotations

from dataclasses import dataclass

from app.jobs import JobQueue
from app.runs import RunStore
from app.settings import AppSettings
from app.uploads import Uploads


@dataclass(frozen=True)
class AppContext:
    """One app: its settings, the runs below its runs folder, their queue, and the uploads of its sessions."""

    settings: AppSettings
    runs: RunStore
    queue: JobQueue
    uploads: Uploads


def make_context(settings: AppSettings) -> AppContext:
    """The context of an app with `settings`; the queue is not started yet."""
    settings.runs_folder.mkdir(parents=True, exist_ok=True)
    runs = RunStore(settings.runs_folder)
    return AppContext(settings, runs, JobQueue(runs), Uploads(settings.uploads_folder))
