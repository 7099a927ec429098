"""What the app prints: short lines, and each traceback once."""

from __future__ import annotations

import io
import logging
import sys
import threading
import traceback

import pytest

from app.server.logs import MAX_LINE_LENGTH, ShortLines, readable_log


def test_lines_are_cut_however_they_are_written() -> None:
    written = io.StringIO()
    lines = ShortLines(written)
    long = "x" * 10_000
    for text in ("short\n", f"{long}\nnext\n", long, long, "\n"):
        lines.write(text)
    for text in ("a" * MAX_LINE_LENGTH, "\r\n", "b" * MAX_LINE_LENGTH, "b\n"):
        lines.write(text)
    print("in", "pieces", "y" * 1000, file=lines)
    full = "x" * MAX_LINE_LENGTH + " ..."
    expected = ["short", full, "next", full, "a" * MAX_LINE_LENGTH, "b" * MAX_LINE_LENGTH + " ..."]
    assert written.getvalue().splitlines() == [*expected, ("in pieces " + "y" * 1000)[:MAX_LINE_LENGTH] + " ..."]


def test_lines_of_several_threads_stay_short() -> None:
    written = io.StringIO()
    lines = ShortLines(written)
    threads = [threading.Thread(target=lambda: [lines.write("z" * 900 + "\n") for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(line) for line in written.getvalue().splitlines()} == {MAX_LINE_LENGTH + 4}


def test_what_is_logged_is_cut_too_and_all_is_as_before_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr, sys.stdout, traceback.print_exc
    with readable_log():
        handler = logging.StreamHandler()
        logging.getLogger("a-library").addHandler(handler)
        logging.getLogger("a-library").error("w" * 9000)
        logging.getLogger("a-library").removeHandler(handler)
        assert sys.stderr.isatty() == before[0].isatty()
    assert capsys.readouterr().err == "w" * MAX_LINE_LENGTH + " ...\n"
    assert before == (sys.stderr, sys.stdout, traceback.print_exc)
