"""The context that every tab works with."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from flatlora_diffusion.config import ConfigError

from .process.temporary_folders import remove_stale_folders
from .queue.queue import JobQueue
from .runs.allowed_paths import AllowedPaths
from .runs.runs import RunStore
from .settings import AppSettings
from .uploads.uploads import Uploads


@dataclass(frozen=True)
class AppContext:
    """One app: its settings, runs, queue, uploads, and the paths that settings from the browser may name."""

    settings: AppSettings
    runs: RunStore
    queue: JobQueue
    uploads: Uploads
    allowed_paths: AllowedPaths


def make_context(settings: AppSettings) -> AppContext:
    """Create the context of an app; the queue is not started.

    Raises ConfigError when the runs folder or its database cannot be used.
    """
    place = f"runs_dir={settings.runs_dir!r}"
    try:
        settings.runs_folder.mkdir(parents=True, exist_ok=True)
        runs = RunStore(settings.runs_folder)
    except OSError as error:
        is_file = settings.runs_folder.is_file()
        reason = "is a file" if is_file else f"cannot be made or written to ({error.strerror})"
        raise ConfigError(f"{place} {reason}; give a folder with --runs_dir") from error
    except sqlite3.OperationalError as error:
        raise ConfigError(
            f"{place} has an .app/app.db that cannot be written ({error}); free some room on its disk if that is "
            "full, let the app write there, or give another folder with --runs_dir"
        ) from error
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"{place} has an .app/app.db that cannot be used ({error}); move that file away, and queue, names, notes "
            "and votes begin anew, or give another folder with --runs_dir"
        ) from error
    uploads = Uploads(settings.uploads_folder)
    for folder in (runs.temporary, uploads.temporary):
        remove_stale_folders(folder)
    private, data = (list(map(Path, folders)) for folders in (settings.private, settings.data_dir))
    allowed_paths = AllowedPaths(runs.folder, private, uploads.frozen, data)
    return AppContext(settings, runs, JobQueue(runs), uploads, allowed_paths)
