"""The run folder: its lock, its files, earlier runs and foreign files in it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from flatlora_diffusion.config import ConfigError, RunError
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.run_lock import lock_folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_user_s_copy_of_a_checkpoint_is_not_a_checkpoint_and_is_not_removed(tmp_path: Path) -> None:
    run, own = (
        RunDir(tmp_path),
        {"checkpoint-9-best", "checkpoint-best", "checkpoint-", "checkpoint-007", "checkpoint-٣"},
    )
    for name in own:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("a note")
    for step in (1, 2, 3):
        with run.new_checkpoint(step, limit=1) as folder:
            (folder / "state").write_text("")
    assert [path.name for path in run.checkpoints()] == ["checkpoint-3"]
    assert run.checkpoint("latest").name == "checkpoint-3"
    assert names(tmp_path) == own | {"checkpoint-3", "checkpoint-12"}
    with pytest.raises(ConfigError, match="'checkpoint-9-best' is not in"):
        run.checkpoint("checkpoint-9-best")


def test_a_failed_checkpoint_leaves_no_files_and_the_error_names_the_run_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(RunError, match="the run folder cannot be written: full"):
        _write_half(run)
    assert names(tmp_path) == set()


def _write_half(run: RunDir) -> None:
    with run.new_checkpoint(1, None) as folder:
        (folder / "state").write_text("half")
        raise OSError("full")


def test_resuming_from_an_earlier_step_archives_later_checkpoints(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (2, 4, 6):
        with run.new_checkpoint(step, limit=None):
            pass
    run.archive_checkpoints_after(2)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2"]
    assert names(tmp_path / "earlier-1") == {"checkpoint-4", "checkpoint-6"}


def test_cleaning_removes_only_partial_files_of_a_killed_run(tmp_path: Path) -> None:
    for name in (".checkpoint-5.part", ".checkpoint-4.old", "checkpoint-3", ".mine.part"):
        (tmp_path / name).mkdir()
    (tmp_path / "images").mkdir()
    killed = (".x.safetensors.4711.part", ".config.json.4711.part", "images/.step-2-0.png.4711.part")
    for name in ("stop", "save", *killed, "x.part", ".hidden", "images/step-1-0.png"):
        (tmp_path / name).write_text("")
    with lock_folder(tmp_path, "output_dir"):
        RunDir(tmp_path).clean()
    assert names(tmp_path) == {"checkpoint-3", ".mine.part", "x.part", ".hidden", "images"}
    assert names(tmp_path / "images") == {"step-1-0.png"}


CONFIG = {"output_dir": "run", "output_name": None}
MANIFEST = [{"id": "a.png", "sha256": "0"}]


@pytest.mark.parametrize("has_earlier", [False, True])
@pytest.mark.parametrize("renames", range(13))
def test_a_start_that_is_killed_at_any_point_can_be_repeated_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, has_earlier: bool
) -> None:
    folder = tmp_path / "run"
    run, before = RunDir(folder), set()
    if has_earlier:
        run.start(CONFIG, MANIFEST)
        before = {"config.json", "manifest.json", "events.jsonl", "pytorch_lora_weights.safetensors"}
        before |= {"run.safetensors", "run.json", "run.png", "README.md"}
        for name in before - {"config.json", "manifest.json"}:
            (folder / name).write_text("")
        (folder / "checkpoint-2").mkdir()
        before.add("checkpoint-2")
    left, real = [None] * renames, os.replace

    def replace(*args: Any) -> None:
        if not left:
            raise SystemExit  # as a kill: nobody tidies up
        left.pop()
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with suppress(SystemExit):
            run.start(CONFIG, MANIFEST)
    run.start(CONFIG, MANIFEST)
    assert (run.config()["output_dir"], run.manifest()) == ("run", MANIFEST)
    earlier = [path for path in folder.iterdir() if path.name.startswith("earlier-")]
    assert before <= {path.name for one in earlier for path in one.iterdir()}
    assert names(folder) == {"config.json", "manifest.json", *(path.name for path in earlier)}


@pytest.mark.parametrize("files", [{"config.json": "{}"}, {"config.json": "{}", "manifest.json": '{"name": "page"}'}])
def test_files_that_are_not_from_a_run_are_not_moved(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"output_dir=.* holds config\.json"):
        RunDir(tmp_path).start(CONFIG, MANIFEST)
    assert names(tmp_path) == set(files)


@pytest.mark.parametrize(
    ("events", "ending"),
    [
        (["start", "step"], None),
        (["start", "step", "finished", "preview", "image_change"], "finished"),
        (["start", "step", "finished", "resumed", "step"], None),
        (["start", "step", "stopped"], "stopped"),
    ],
)
def test_a_run_has_ended_if_no_step_follows_its_last_event(
    tmp_path: Path, events: list[str], ending: str | None
) -> None:
    (tmp_path / "events.jsonl").write_text("".join(json.dumps({"event": event}) + "\n" for event in events))
    result = RunDir(tmp_path).ending()
    assert (None if result is None else result["event"]) == ending


def test_a_repeated_step_counts_once_with_its_last_values(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for life, (resumed, steps) in enumerate([(None, range(5)), (2, range(2, 4)), (3, range(3, 4))]):
        if resumed is not None:
            run.add_event({"event": "resumed", "step": resumed})
        for step in steps:
            run.add_event({"event": "step", "step": step, "life": life})
            run.add_event({"event": "holdout", "step": step + 1, "loss": float(life)})
    assert [(one["step"], one["life"]) for one in run.steps()] == [(0, 0), (1, 0), (2, 1), (3, 2)]
    assert run.holdout_losses() == {1: 0.0, 2: 0.0, 3: 1.0, 4: 2.0}


def test_steps_logged_twice_without_a_resume_count_once_in_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (0, 1, 2, 1):
        run.add_event({"event": "step", "step": step})
    assert [one["step"] for one in run.steps()] == [0, 1, 2]


def test_a_folder_is_locked_for_a_single_run_and_unchanged_after_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with lock_folder(folder, "output_dir"):
        with (
            pytest.raises(ConfigError, match=r"output_dir='.*one'"),
            lock_folder(folder, "output_dir"),
        ):
            pass
        with lock_folder(tmp_path, "output_dir"):
            pass
    assert not folder.exists()
    with lock_folder(folder, "output_dir"):
        (folder / "file").write_text("")
    assert names(folder) == {"file"}


def test_a_folder_that_cannot_be_created_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    complaint = r"output_dir='.*' cannot be written: .+; give another folder"
    with pytest.raises(ConfigError, match=complaint), lock_folder(folder, "output_dir"):
        pass


def test_a_lock_holds_even_if_its_file_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = FileLock.acquire
    removed: list[bool] = []

    def acquire_a_removed_file(lock: FileLock, timeout: float | None = None) -> object:
        proxy = acquire(lock, timeout=timeout)
        if not removed:  # as by a holder that ended between the opening and the locking of its file
            removed.append(True)
            (tmp_path / ".lock").unlink()
        return proxy

    monkeypatch.setattr(FileLock, "acquire", acquire_a_removed_file)
    with (
        lock_folder(tmp_path, "output_dir"),
        pytest.raises(ConfigError, match="output_dir="),
        lock_folder(tmp_path, "output_dir"),
    ):
        pass
