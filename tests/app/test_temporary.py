"""Temporary folders: gone with their app, and those of a killed one at the next start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.context import make_context
from app.process.temporary_folders import remove_stale_folders
from app.settings import AppSettings

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from app.process.temporary_folders import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "upload.png").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process with a temporary folder in `parent`."""

    def __init__(self, parent: Path) -> None:
        command = [sys.executable, "-c", HOLD, str(parent)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]
        self.folder = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path / "shared")
    yield holder
    holder.kill()


def test_the_folder_of_a_killed_app_is_removed_and_that_of_a_living_one_stays(holder: Holder, tmp_path: Path) -> None:
    parent = tmp_path / "shared"
    remove_stale_folders(parent)
    assert (holder.folder / "upload.png").exists()
    holder.kill()
    assert (holder.folder / "upload.png").exists()
    (parent / "flatlora-mine").mkdir()
    (parent / "notes.lock").write_text("mine")
    remove_stale_folders(parent)
    assert sorted(path.name for path in parent.iterdir()) == ["flatlora-mine", "notes.lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and owners")
def test_what_another_user_may_have_laid_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    (tmp_path / "flatlora-a.lock").symlink_to(tmp_path / "letter.txt")
    (tmp_path / "flatlora-b.lock").write_text("")
    for name in "ab":
        (tmp_path / f"flatlora-{name}").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / "letter.txt").stat().st_uid + 1)
    remove_stale_folders(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "flatlora-b").exists()
    remove_stale_folders(tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"
    assert {path.name for path in tmp_path.iterdir()} == {"letter.txt", "flatlora-a", "flatlora-a.lock"}


def test_an_app_that_starts_removes_what_killed_ones_left_in_its_runs_folder(tmp_path: Path) -> None:
    settings = AppSettings(runs_dir=str(tmp_path / "runs"))
    context = make_context(settings)
    left = []
    for place in (context.runs.temporary, context.uploads.temporary):
        holder = Holder(place)
        holder.process.send_signal(signal.SIGTERM)
        holder.process.wait()
        left.append(holder.folder)
    assert all(folder.exists() for folder in left)
    make_context(settings)
    assert not any(folder.exists() for folder in left)
