"""What ends a program early: signals, a `stop` file in the run folder, its time being up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from flatlora_diffusion.storage.run_dir import RunDir

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal has ended what was going on; the message says what became of it. Its exit code is a shell's."""

    def __init__(self, number: int, became: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{became and ' '}{became}")
        self.number, self.became = number, became

    @property
    def code(self) -> int:
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """While open, SIGINT and SIGTERM raise Interrupted, so that files are closed; a second one ends the process."""
    previous = _handled_by(_interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[list[int]]:
    """While open, SIGINT and SIGTERM are put into this list, and nothing else; a second one ends the process.

    For code that runs finalizers: Python prints and forgets what is raised in one.
    """
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if came:
            _interrupt(number, frame)
        came.append(number)

    previous = _handled_by(remember)
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_as(became: Callable[[], str]) -> Iterator[None]:
    """Have an interruption say what became of what goes on while this is open."""
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted) and error.became:
            raise
        raise Interrupted(error.number if isinstance(error, Interrupted) else signal.SIGINT, became()) from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_DFL)
    raise Interrupted(number)


def _handled_by(handler: Any) -> dict[int, Any]:
    """The handlers that were there before; none outside of the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in _SIGNALS}


class Stopping:
    """While open, SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT interrupts at once."""

    def __init__(self, run: RunDir, max_seconds: float | None) -> None:
        self._run, self._max_seconds = run, max_seconds
        self._began = time.monotonic()
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def reason(self) -> str | None:
        """Why to stop now, or None."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if any(file.exists() for file in self._run.stop_files):
            return "the stop file"
        if self._max_seconds is not None and time.monotonic() - self._began >= self._max_seconds:
            return f"max_train_seconds={self._max_seconds:g}"
        return None

    def interrupt(self) -> None:
        """Raises Interrupted if a signal has come: for what is not worth waiting for."""
        if self._signal is not None:
            raise Interrupted(self._signal)

    def __enter__(self) -> Stopping:
        self._previous = _handled_by(self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            _interrupt(number, frame)
        self._signal = number
