"""The app's SQLite database: the queue, names and notes of runs, the trash, and blind votes.

Each call opens a connection, so threads may share a `Database`, and several processes may open the same file.
"""

from __future__ import annotations

import json
import sqlite3
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flatlora_diffusion.config import ConfigError

from .file_cache import FileCache

JobKind = Literal["train", "resume", "generate", "flatness"]
JobState = Literal["queued", "running", "done", "failed", "stopped", "cancelled"]
Choice = Literal["left", "right", "tie"]

_WAIT_SECONDS = 30
# Schema N is made by the first N scripts; a released one is never changed.
_MIGRATIONS = (
    (
        """CREATE TABLE jobs (
            id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, run TEXT, settings TEXT NOT NULL,
            state TEXT NOT NULL, position REAL NOT NULL, session TEXT NOT NULL, pair TEXT, launch TEXT,
            goes_on INTEGER NOT NULL DEFAULT 0, exit_code INTEGER, error TEXT, created REAL NOT NULL, ended REAL
        )""",
        "CREATE INDEX jobs_by_state ON jobs (state, position)",
        "CREATE TABLE labels (run TEXT PRIMARY KEY, name TEXT, tags TEXT NOT NULL, note TEXT NOT NULL)",
        "CREATE TABLE trash (id TEXT PRIMARY KEY, run TEXT NOT NULL, deleted REAL NOT NULL)",
        """CREATE TABLE votes (
            pair TEXT NOT NULL, question TEXT NOT NULL, session TEXT NOT NULL, choice TEXT NOT NULL,
            time REAL NOT NULL, PRIMARY KEY (pair, question, session)
        )""",
    ),
    ("ALTER TABLE jobs ADD COLUMN about TEXT NOT NULL DEFAULT '{}'",),
)


@dataclass(frozen=True)
class Job:
    """One entry of the queue.

    Attributes:
        settings: the settings of a training, or the arguments of another command.
        pair: shared by the two arms of a fair pair.
        goes_on: whether it is resumed after the job that preempted it.
        about: details that its results depend on beside the arguments.
    """

    id: int
    kind: JobKind
    run: str | None
    settings: dict[str, Any] | list[str]
    state: JobState
    position: float
    session: str
    pair: str | None
    launch: str | None
    goes_on: bool
    exit_code: int | None
    error: str | None
    created: float
    ended: float | None
    about: dict[str, Any]


@dataclass(frozen=True)
class NewJob:
    """A job to be queued."""

    kind: JobKind
    settings: dict[str, Any] | list[str]
    session: str
    run: str | None = None
    pair: str | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Label:
    """The user's name, tags and note of a run."""

    name: str | None = None
    tags: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class DeletedRun:
    """One run in the trash: its trash folder's name, its id, and the time of deletion (seconds since 1970)."""

    id: str
    run: str
    deleted: float


@dataclass(frozen=True)
class Vote:
    """One answer about one blind pair. `pair` identifies the pictures and their order."""

    pair: str
    question: str
    session: str
    choice: Choice
    time: float


class Database:
    """The database file at `path`. Raises ConfigError for a file of a newer version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (str(path), f"{path}-wal")
        self._kept: FileCache[Any] = FileCache()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Open until the store is gone: with the last connection goes what the next reader would need room on disk for.
        held = self._connect(check_same_thread=False)
        weakref.finalize(self, held.close)
        held.execute("PRAGMA journal_mode=WAL")
        held.execute("PRAGMA user_version").fetchone()  # the first read makes those files
        with self._open() as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > len(_MIGRATIONS):
                raise ConfigError(f"{path.name} was made by a newer version of the app; update the app")
            for script in _MIGRATIONS[version:]:
                for statement in script:
                    database.execute(statement)
            database.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    def add_jobs(self, jobs: Sequence[NewJob], first: bool = False) -> list[Job]:
        """Queue all jobs, or none on an error: at the end, or before all others with `first`."""
        with self._open() as database:
            low, high = database.execute("SELECT MIN(position), MAX(position) FROM jobs").fetchone()
            start = (low or 0) - len(jobs) if first else (high or 0) + 1
            ids = [
                database.execute(
                    "INSERT INTO jobs (kind, run, settings, state, position, session, pair, created, about) "
                    "VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?)",
                    (
                        *(job.kind, job.run, json.dumps(job.settings), start + place),
                        *(job.session, job.pair, time.time(), json.dumps(job.about)),
                    ),
                ).lastrowid
                for place, job in enumerate(jobs)
            ]
            return [_job(database.execute("SELECT * FROM jobs WHERE id = ?", (id_,)).fetchone()) for id_ in ids]

    def job(self, job_id: int) -> Job:
        """Raises ConfigError for an unknown number."""
        rows = self._rows("SELECT * FROM jobs WHERE id = ?", job_id)
        if not rows:
            raise ConfigError(f"there is no job {job_id} in the queue")
        return _job(rows[0])

    def jobs(self, *states: JobState) -> list[Job]:
        """The jobs in these states, or all, in the order they run."""
        marks = ", ".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        query = f"SELECT * FROM jobs {where} ORDER BY position, id"
        made = self._kept.get(states, lambda: ([_job(row) for row in self._rows(query, *states)], self.files))
        return list(made)

    def change_job(self, job_id: int, was: JobState, **values: Any) -> bool:
        """Set columns of a job if it still is in the state `was`; whether it was."""
        names = ", ".join(f"{name} = ?" for name in values)
        with self._open() as database:
            done = database.execute(
                f"UPDATE jobs SET {names} WHERE id = ? AND state = ?", (*values.values(), job_id, was)
            )
            return done.rowcount == 1

    def labels(self) -> dict[str, Label]:
        """The labels by run."""
        labels: dict[str, Label] = self._kept.get("labels", lambda: (self._read_labels(), self.files))
        return labels

    def set_label(self, run: str, label: Label) -> None:
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?)",
                (run, label.name, json.dumps(label.tags), label.note),
            )

    def add_deleted(self, trash_id: str, run: str) -> None:
        with self._open() as database:
            database.execute("INSERT INTO trash VALUES (?, ?, ?)", (trash_id, run, time.time()))

    def forget_deleted(self, trash_id: str) -> None:
        with self._open() as database:
            database.execute("DELETE FROM trash WHERE id = ?", (trash_id,))

    def deleted(self) -> list[DeletedRun]:
        """The runs in the trash, the last deleted first."""
        return [DeletedRun(*row) for row in self._rows("SELECT id, run, deleted FROM trash ORDER BY deleted DESC")]

    def add_vote(self, pair: str, question: str, session: str, choice: Choice) -> None:
        """Keep the answer; a session that answers again changes its answer."""
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO votes VALUES (?, ?, ?, ?, ?)", (pair, question, session, choice, time.time())
            )

    def votes(self, question: str | None = None) -> list[Vote]:
        """The answers to one question, or to all, in order of time."""
        rows = self._rows(
            "SELECT pair, question, session, choice, time FROM votes WHERE ? IS NULL OR question = ? ORDER BY time",
            question,
            question,
        )
        return [Vote(*row) for row in rows]

    def _read_labels(self) -> dict[str, Label]:
        rows = self._rows("SELECT run, name, tags, note FROM labels")
        return {row["run"]: Label(row["name"], tuple(json.loads(row["tags"])), row["note"]) for row in rows}

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with closing(self._connect()) as database:
            return database.execute(query, values).fetchall()

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One exclusive write transaction."""
        with closing(self._connect()) as database:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")  # closed without it, all is undone

    def _connect(self, check_same_thread: bool = True) -> sqlite3.Connection:
        database = sqlite3.connect(
            self.path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=check_same_thread
        )
        database.row_factory = sqlite3.Row
        return database


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    objects = {name: json.loads(values[name]) for name in ("settings", "about")}
    return Job(**values | objects | {"goes_on": bool(values["goes_on"])})
