"""The database: what is kept, under two processes too, and how it grows with new versions."""

from __future__ import annotations

import gc
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from patience import HANGS
from small_disk import SmallDisk

from app.context import make_context
from app.errors import is_disk_full
from app.process.database import Database, Label, NewJob
from app.settings import AppSettings
from flatlora_diffusion.config import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def full(disk: SmallDisk) -> Iterator[Database]:
    """A store with one job on a disk that is full."""
    store = Database(disk.place / "app.db")
    store.add_jobs([job("a")])
    disk.fill()
    yield store
    disk.empty()


@pytest.fixture
def store(tmp_path: Path) -> Database:
    return Database(tmp_path / "private" / "app.db")


def job(name: str) -> NewJob:
    return NewJob("train", {"rank": 4, "instance_prompt": "ä\x00"}, "session", run=name)


def test_jobs_keep_their_order_and_their_settings(store: Database) -> None:
    store.add_jobs([job("a"), job("b")])
    (urgent,) = store.add_jobs([NewJob("generate", ["--prompts", "x"], "other")], first=True)
    found = Database(store.path).jobs()
    assert [(one.run, one.kind, one.state) for one in found] == [
        (None, "generate", "queued"),
        ("a", "train", "queued"),
        ("b", "train", "queued"),
    ]
    assert found[0].settings == ["--prompts", "x"]
    assert found[1].settings == {"rank": 4, "instance_prompt": "ä\x00"}
    assert store.job(urgent.id) == found[0]
    with pytest.raises(ConfigError, match="no job 99"):
        store.job(99)


def test_a_full_disk_hinders_no_reader_and_takes_nothing(full: Database, disk: SmallDisk) -> None:
    with pytest.raises(sqlite3.OperationalError) as rejected:
        full.add_jobs([job(name) for name in "bcdefg" * 20])
    assert is_disk_full(rejected.value)
    assert [one.run for one in full.jobs("queued")] == ["a"]
    disk.free()
    full.add_jobs([job("b")])
    assert [one.run for one in full.jobs()] == ["a", "b"]


def test_an_app_on_a_full_disk_says_so_and_not_to_move_its_database_away(disk: SmallDisk) -> None:
    runs = disk.place / "runs"
    make_context(AppSettings(runs_dir=str(runs)))
    gc.collect()
    disk.fill()
    try:
        with pytest.raises(ConfigError, match=r"runs_dir=.* free some room on its disk") as told:
            make_context(AppSettings(runs_dir=str(runs)))
        assert "move that file away" not in str(told.value)
    finally:
        disk.empty()


def test_a_job_changes_only_from_the_state_it_was_in(store: Database) -> None:
    (one,) = store.add_jobs([job("a")])
    assert store.change_job(one.id, "queued", state="running", launch="x")
    assert not store.change_job(one.id, "queued", state="cancelled")
    assert [(found.state, found.launch) for found in store.jobs("running")] == [("running", "x")]


def test_labels_trash_and_votes(store: Database) -> None:
    assert store.labels() == {}
    store.set_label("a", Label("Löwe", ("good", "3d"), "note"))
    store.set_label("a", Label("Löwe", ("good",), "note"))
    assert store.labels() == {"a": Label("Löwe", ("good",), "note")}
    store.add_deleted("a-1", "a")
    store.add_deleted("b-1", "b")
    assert [deleted.run for deleted in store.deleted()] == ["b", "a"]
    store.forget_deleted("b-1")
    assert [deleted.id for deleted in store.deleted()] == ["a-1"]
    store.add_vote("pair-1", "style", "me", "left")
    store.add_vote("pair-1", "prompt", "me", "tie")
    store.add_vote("pair-1", "style", "you", "right")
    store.add_vote("pair-1", "style", "me", "right")
    assert [(vote.session, vote.choice) for vote in store.votes("style")] == [("you", "right"), ("me", "right")]
    assert len(store.votes()) == 3


def test_a_failed_call_changes_nothing(store: Database) -> None:
    with pytest.raises(TypeError):
        store.add_jobs([job("a"), NewJob("train", {"bad": object()}, "session")])  # no JSON
    assert store.jobs() == []


WRITER = """
import sys
from pathlib import Path
from app.process.database import NewJob, Database
for number in range(100):
    store = Database(Path(sys.argv[1]))
    store.add_jobs([NewJob("train", {"rank": number}, sys.argv[2])])
    store.add_vote(f"pair-{number}", "style", sys.argv[2], "left")
"""


def test_two_processes_and_threads_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=ROOT, stderr=subprocess.PIPE)
        for name in ("one", "two")
    ]
    store = Database(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: store.add_jobs([job(str(number))]), range(100)))
    for process in processes:
        _, error = process.communicate(timeout=HANGS)
        assert process.returncode == 0, error
    jobs = store.jobs()
    assert len(jobs) == 300
    assert len({one.position for one in jobs}) == 300
    assert len(store.votes()) == 200
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_database_of_a_newer_version_is_left_alone(store: Database) -> None:
    with closing(sqlite3.connect(store.path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match=r"app\.db was made by a newer version"):
        Database(store.path)
    with closing(sqlite3.connect(store.path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (99,)


def test_a_database_of_the_first_version_keeps_its_jobs(store: Database) -> None:
    store.add_jobs([job("a")])
    with closing(sqlite3.connect(store.path)) as database:
        database.execute("ALTER TABLE jobs DROP COLUMN about")
        database.execute("PRAGMA user_version = 1")
        database.commit()
    found = Database(store.path)
    assert [(one.run, one.about) for one in found.jobs()] == [("a", {})]
    found.add_jobs([NewJob("generate", ["--help"], "me", about={"base": "abc"})])
    assert Database(store.path).jobs()[1].about == {"base": "abc"}
