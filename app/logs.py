"""What the app prints stays readable, whatever it is asked: no line is long, and no traceback is told twice."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

MOST_LETTERS = 400  # of a line


class ShortLines:
    """A text stream whose lines end after MOST_LETTERS; what is written to it may come in pieces, from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._length = 0  # of the line so far

    def write(self, text: str) -> int:
        with self._lock:
            self._stream.write("".join(map(self._cut, text.splitlines(keepends=True))))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _cut(self, piece: str) -> str:
        words = piece.rstrip("\r\n")
        before, after = self._length, self._length + len(words)
        end = piece[len(words) :]
        self._length = 0 if end else after
        dots = " ..." if before <= MOST_LETTERS < after else ""
        return words[: max(0, MOST_LETTERS - before)] + dots + end


class Tracebacks:
    """Prints the traceback of an error once; the same error from the same line is one line after that."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str, int | None]] = set()

    def print_exc(self, limit: int | None = None, file: SupportsWrite[str] | None = None, chain: bool = True) -> None:
        """As that of `traceback`."""
        error = sys.exception()
        if error is None:
            return
        frames = traceback.extract_tb(error.__traceback__)
        place = (frames[-1].filename, frames[-1].lineno) if frames else ("", None)
        key = (type(error).__name__, *place)
        if key in self._told:
            told = " ".join(str(error).split())
            print(f"{key[0]} again, {place[0]}:{place[1]}: {told}", file=file or sys.stderr)
            return
        self._told.add(key)
        traceback.print_exception(error, limit=limit, file=file, chain=chain)


@contextmanager
def readable_log() -> Iterator[None]:
    """All that is printed meanwhile has short lines, and tells each traceback that Gradio prints once."""
    original = traceback.print_exc
    traceback.print_exc = Tracebacks().print_exc  # Gradio calls it for each event that fails
    try:
        with (
            redirect_stdout(cast(TextIO, ShortLines(sys.stdout))),
            redirect_stderr(cast(TextIO, ShortLines(sys.stderr))),
        ):
            yield
    finally:
        traceback.print_exc = original
