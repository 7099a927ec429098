"""Whatever goes wrong in an event of the page is one sentence there."""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.blocks import BlockFunction
from gradio.state_holder import SessionState

from app.context import make_context
from app.errors import describe_error, is_disk_full, is_user_error
from app.settings import AppSettings
from app.ui import build_app
from app.widgets.messages import Page
from flatlora_diffusion.config import ConfigError, RunError


def fill_database() -> None:
    """What SQLite says on a full disk, of a real database that may not grow."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE t (x)")
        database.execute("PRAGMA max_page_count = 2")
        database.execute("INSERT INTO t VALUES (?)", ("x" * 100_000,))


def open_nothing() -> None:
    Path("/no/such/folder/notes.txt").read_text()


def raised(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def told(fail: Callable[[], None]) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any kind
        fail()
    return describe_error(caught.value)


def call(page: gr.Blocks, event: BlockFunction) -> None:
    """Go through the event as a request does, in a thread, as a browser of another test may have its loop in this."""
    answer = page.process_api(event, [None] * len(event.inputs), state=SessionState(page))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, answer).result()


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (fill_database, "the disk is full"),
        (raised(OSError(errno.ENOSPC, "No space left on device", "/secret/place")), "the disk is full"),
        (open_nothing, "notes.txt cannot be read or written: No such file or directory"),
        (
            raised(sqlite3.OperationalError("database is locked")),
            "database cannot be used (database is locked)",
        ),
        (raised(MemoryError()), "memory has run out"),
        (raised(ConfigError("rank=0 must be 1 or more")), "rank=0 must be 1 or more"),
        (raised(RunError("the loss is not finite")), "the loss is not finite"),
        (raised(KeyError("/secret/place")), "an error in this program prevented it (KeyError"),
    ],
)
def test_an_error_is_one_sentence_that_tells_no_place(fail: Callable[[], None], words: str) -> None:
    sentence = told(fail)
    assert words in sentence
    assert "\n" not in sentence
    assert not {"/secret", "/no/such"} & {part for part in ("/secret", "/no/such") if part in sentence}


def test_only_a_fault_of_the_program_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    told(raised(ConfigError("x")))
    assert caplog.records == []
    told(fill_database)
    assert [(record.levelno, record.exc_info) for record in caplog.records] == [(logging.WARNING, None)]
    told(raised(KeyError("x")))
    assert len(caplog.records) == 2
    assert "Traceback" in caplog.text


def test_what_may_be_tried_again_is_told_from_what_was_refused() -> None:
    assert is_user_error(ConfigError("x"))
    assert not is_user_error(OSError(errno.ENOSPC, "x"))
    assert not is_disk_full(OSError(errno.EACCES, "x"))
    assert not is_disk_full(sqlite3.OperationalError("database is locked"))


def test_every_event_of_the_page_answers_any_error_with_a_sentence(tmp_path: Path) -> None:
    page = build_app(make_context(AppSettings(runs_dir=str(tmp_path / "runs"))))
    called = [one for one in page.fns.values() if one.fn is not None]
    assert len(called) > 40

    def fail(*values: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for one in called:
        one.fn, one.preprocess, one.inputs_as_dict = fail, False, False
        with pytest.raises(gr.Error) as caught:
            call(page, one)
        assert "the disk is full" in caught.value.message, one.name


def test_an_error_outside_of_a_handler_and_a_hostile_one_are_told_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_be_shown(box: gr.Textbox, value: str) -> str:
        raise ValueError(value)

    def refuse() -> str:
        raise ConfigError("<img src=x> is none")

    with Page() as page:
        box = gr.Textbox()
        page.load(lambda: "x", None, box)
        page.load(refuse, None, box)
    monkeypatch.setattr(gr.Textbox, "postprocess", cannot_be_shown)
    messages = []
    for event in page.fns.values():
        with pytest.raises(gr.Error) as caught:
            call(page, event)
        messages.append(caught.value.message)
    assert "ValueError" in messages[0]
    assert messages[1] == "&lt;img src=x&gt; is none"
