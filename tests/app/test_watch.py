"""What is looked at while nothing happens: times and sizes, no file opened, nothing sent; and no change is missed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from tiny_runs import age

from app.__main__ import GRADIO_SETTINGS, queued
from app.context import AppContext
from app.process.database import Database, NewJob
from app.process.file_cache import FileCache
from app.process.launch import Launch
from app.runs_tab.run_list import NEWEST
from app.runs_tab.tab import refresh
from app.ui import build_app
from app.widgets.ticks import skip_unchanged
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.run_dir import LORA_FILE

OPENED: list[list[str]] = []


def _note(event: str, values: tuple[Any, ...]) -> None:
    if OPENED and event in ("open", "os.scandir", "os.listdir", "sqlite3.connect"):
        OPENED[-1].append(f"{event} {values[0]}")


@pytest.fixture(scope="module", autouse=True)
def _heard() -> None:
    """Python tells a hook of each file that is opened, by whatever module. It stays, and does nothing from then on."""
    sys.addaudithook(_note)


@contextmanager
def opened() -> Iterator[list[str]]:
    """The files, folders and databases that are opened meanwhile."""
    OPENED.append([])
    try:
        yield OPENED[-1]
    finally:
        OPENED.pop()


def add_run(context: AppContext, name: str, steps: int = 3) -> Path:
    """A finished run that the app has started."""
    folder = context.runs.folder / name
    folder.mkdir(parents=True)
    config = TrainConfig.from_dict(
        {"method": "lora" if name.endswith("-lora") else "flat-lora", "max_train_steps": 3, "instance_data_dir": "x"}
    ).to_dict()
    values = config | {"pretrained_model_name_or_path": "tiny", "resolution": 64}
    write_json(folder / "config.json", values)
    write_json(folder / "manifest.json", [])
    events: list[dict[str, Any]] = [
        {"event": "step", "step": step, "loss": 0.1, "seconds": 1.0, "eta": 0.0} for step in range(steps)
    ]
    events.append({"event": "finished"})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / LORA_FILE).write_bytes(b"a LoRA")
    launch = context.runs.paths.next_launch(name)
    launch.folder.mkdir(parents=True)
    write_json(launch.settings_file, values)
    (job,) = context.runs.database.add_jobs([NewJob("train", values, "me", name)])
    context.runs.database.change_job(job.id, "queued", state="done", launch=f"runs/{name}/launch-1", ended=time.time())
    end(launch)
    return folder


def end(launch: Launch) -> None:
    write_json(launch.exit_file, {"code": 0, "was_asked": False, "time": time.time()})


class Page:
    """A page that is open on one tab, as far as the timer of the tab goes."""

    def __init__(self, blocks: gr.Blocks, timer: gr.Timer) -> None:
        (self._event,) = [one for one in blocks.fns.values() if (timer._id, "tick") in one.targets]
        self._values = {part._id: getattr(part, "value", None) for part in self._event.inputs}
        self._values |= {part._id: part.value or "" for part in self._event.inputs if isinstance(part, gr.Textbox)}

    def tick(self) -> list[str]:
        """The classes of what was sent anew."""
        answers = self._event.fn(*(self._values[part._id] for part in self._event.inputs))
        news = []
        for part, answer in zip(self._event.outputs, answers, strict=True):
            if answer == gr.skip():
                continue
            news.append(type(part).__name__)
            is_update = isinstance(answer, dict) and answer.get("__type__") == "update"
            value = answer.get("value", self._values.get(part._id)) if is_update else answer
            self._values[part._id] = getattr(value, "value", value)
        return news

    def rest(self) -> None:
        """Tick until there are no news."""
        for _ in range(5):
            if not self.tick():
                return
        raise AssertionError(f"there is no end of news: {self.tick()}")


@pytest.fixture
def pages(context: AppContext) -> dict[str, Page]:
    """A page on each tab that ticks, all at rest."""
    for name in ("one-lora", "one-flat-lora", "two-lora"):
        add_run(context, name)
    blocks = build_app(context)
    timers = [part for part in blocks.blocks.values() if isinstance(part, gr.Timer)]
    pages = dict(zip(("train", "compare", "flatness"), (Page(blocks, timer) for timer in timers), strict=True))
    age(context.runs.folder)
    for page in pages.values():
        page.rest()
    return pages


def test_a_tick_opens_nothing_and_sends_nothing_while_nothing_happens(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        with opened() as files:
            assert page.tick() == [], name
        assert files == [], name


@pytest.mark.parametrize(
    ("happens", "tabs"),
    [
        (lambda context: context.runs.rename("two-lora", "another"), {"train"}),
        (lambda context: add_run(context, "three-lora"), {"train", "compare", "flatness"}),
        (lambda context: context.runs.delete("one-lora"), {"compare", "flatness"}),
        (lambda context: (context.runs.folder / "two-lora" / LORA_FILE).unlink(), {"train", "compare", "flatness"}),
    ],
    ids=["renamed", "added", "deleted", "its LoRA removed"],
)
def test_a_tick_sends_what_has_happened(
    context: AppContext, pages: dict[str, Page], happens: Callable[[AppContext], Any], tabs: set[str]
) -> None:
    happens(context)
    assert {name for name, page in pages.items() if set(page.tick()) - {"State"}} >= tabs


def test_an_error_that_goes_on_is_told_once_and_what_comes_after_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    broken = OSError(errno.ENOSPC, "No space left on device")
    errors: list[Exception | None] = [None, broken, broken, KeyError("x"), KeyError("x"), None, broken]

    def handler(value: str) -> tuple[str]:
        error = errors[len(shown)]
        if error is not None:
            raise error
        return (value,)

    monkeypatch.setattr(gr, "Warning", lambda text, title: told.append(text))
    with gr.Blocks():
        event = skip_unchanged({"fn": handler, "inputs": [gr.State()], "outputs": [gr.State()]}, lambda: None)
    shown: list[bool] = []
    seen: Any = None
    for _ in errors:
        one, seen = event["fn"](seen, "news")
        shown.append(one == "news")
    assert shown == [error is None for error in errors]
    assert ["disk is full" in text or "KeyError" in text for text in told] == [True] * 3


def test_a_step_is_shown_on_the_train_tab_alone(context: AppContext, pages: dict[str, Page]) -> None:
    folder = add_run(context, "now-lora", steps=1)
    launch = context.runs.paths.last_launch("now-lora")
    assert launch is not None
    launch.exit_file.unlink()
    write_json(launch.command_file, {})  # it was started a moment ago
    events = folder / "events.jsonl"
    for page in pages.values():
        page.tick()
    age(context.runs.folder)
    os.utime(launch.command_file)
    for name in ("compare", "flatness"):
        pages[name].rest()
    with events.open("a") as file:
        file.write(json.dumps({"event": "step", "step": 1, "loss": 0.2, "seconds": 1.0}) + "\n")
    assert "HTML" in pages["train"].tick()
    for name in ("compare", "flatness"):
        with opened() as files:
            assert pages[name].tick() == [], name
        of_processes = ("supervisor.json", "trainer.json")  # whether they live is no matter of files
        assert [file for file in files if not file.endswith(of_processes)] == [], name


def test_a_run_from_elsewhere_that_comes_while_folders_settle_is_watched(context: AppContext) -> None:
    first = add_run(context, "one-lora")
    age(context.runs.private)
    assert context.runs.fingerprint() is None
    events = Path(shutil.copytree(first, context.runs.folder / "elsewhere")) / "events.jsonl"
    for folder in (first, events.parent):
        age(folder)
    os.utime(context.runs.folder, (0, 0))
    before = context.runs.fingerprint()
    assert before is not None
    assert context.runs.fingerprint() == before
    events.write_text(events.read_text() + "\n")
    age(events.parent)
    assert context.runs.fingerprint() not in (None, before)


def test_the_list_of_runs_opens_only_what_has_changed(context: AppContext) -> None:
    folders = [add_run(context, f"{number}-lora") for number in range(4)]
    age(context.runs.folder)
    first = refresh(context, None, "", NEWEST)
    with opened() as files:
        assert refresh(context, None, "", NEWEST)[0] == first[0]
    assert [file for file in files if any(folder.name in file for folder in folders)] == []
    (folders[2] / LORA_FILE).unlink()
    with opened() as files:
        assert "failed" in refresh(context, None, "", NEWEST)[0]
    read = [file for file in files if file.startswith("open ")]
    assert any(folders[2].name in file for file in read)
    assert not any(folders[1].name in file for file in read)


def test_what_another_app_writes_into_the_database_is_seen(tmp_path: Path) -> None:
    mine, theirs = Database(tmp_path / "app.db"), Database(tmp_path / "app.db")
    (job,) = theirs.add_jobs([NewJob("train", {}, "them", "one")])
    age(tmp_path)
    assert mine.jobs("queued") == [job]
    with opened() as files:
        assert mine.jobs("queued") == [job]
        assert mine.labels() == mine.labels()
    assert files == [f"sqlite3.connect {tmp_path / 'app.db'}"]  # of the labels, once
    theirs.change_job(job.id, "queued", state="cancelled")
    assert mine.jobs("queued") == []


def test_gradio_does_little_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an attribute and by variables of its own, which have to be there still."""
    for name, value in GRADIO_SETTINGS.items():
        monkeypatch.setenv(name, value)
    page = gr.Blocks()
    assert page.queue()._queue.sleep_when_free < queued(page)._queue.sleep_when_free <= 0.05
    assert page._queue.ANALYTICS_MAX_EVENTS == 1
    assert page._queue.ANAYLTICS_CACHE_FREQUENCY > 10**6


def test_a_second_change_in_the_same_moment_is_not_missed(tmp_path: Path) -> None:
    file = tmp_path / "value"
    kept: FileCache[str] = FileCache()

    def read() -> str:
        return kept.get("it", lambda: (file.read_text(), [str(file)]))

    file.write_text("1")
    moment = file.stat().st_mtime_ns
    assert read() == "1"
    file.write_text("2")
    os.utime(file, ns=(moment, moment))  # the clock of the file system has not gone on
    assert read() == "2"
    age(tmp_path)
    assert read() == "2"
    with opened() as files:
        assert read() == "2"
    assert files == []
