"""A readable log: short lines, and each traceback once."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, cast

from ..errors import logger

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

MAX_LINE_LENGTH = 400  # of a line


class ShortLines:
    """A text stream that cuts lines at MAX_LINE_LENGTH; text may come in pieces and from any thread."""

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
        dots = " ..." if before <= MAX_LINE_LENGTH < after else ""
        return words[: max(0, MAX_LINE_LENGTH - before)] + dots + end


class Tracebacks(logging.Filter):
    """Prints the traceback of an error once; the same error from the same line becomes one line."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[tuple[str, str, int | None]] = set()

    def print_exc(self, limit: int | None = None, file: SupportsWrite[str] | None = None, chain: bool = True) -> None:
        """Replaces `traceback.print_exc`."""
        error = sys.exception()
        if error is None:
            return
        again = self._again(error)
        if again is not None:
            print(again, file=file or sys.stderr)
            return
        traceback.print_exception(error, limit=limit, file=file, chain=chain)

    def filter(self, record: logging.LogRecord) -> bool:
        """Print the traceback of a log record once."""
        error = record.exc_info[1] if record.exc_info else None
        again = None if error is None else self._again(error)
        if again is not None:
            record.msg, record.args, record.exc_info = f"{record.getMessage()}: {again}", (), None
        return True

    def _again(self, error: BaseException) -> str | None:
        """One line for a repeated error; None for a new one."""
        frames = traceback.extract_tb(error.__traceback__)
        place = (frames[-1].filename, frames[-1].lineno) if frames else ("", None)
        key = (type(error).__name__, *place)
        if key not in self._told:
            self._told.add(key)
            return None
        return f"{key[0]} again, {place[0]}:{place[1]}: {' '.join(str(error).split())}"


@contextmanager
def readable_log() -> Iterator[None]:
    """Shorten all printed lines, and print each traceback from Gradio once."""
    original, tracebacks = traceback.print_exc, Tracebacks()
    traceback.print_exc = tracebacks.print_exc  # Gradio calls it for each event that fails
    logger.addFilter(tracebacks)
    try:
        with (
            redirect_stdout(cast(TextIO, ShortLines(sys.stdout))),
            redirect_stderr(cast(TextIO, ShortLines(sys.stderr))),
        ):
            yield
    finally:
        traceback.print_exc = original
        logger.removeFilter(tracebacks)
