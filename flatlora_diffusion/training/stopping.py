"""Requests to stop a run after the current step: a signal, a `stop` file in the run folder, or --max_train_seconds."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flatlora_diffusion.signals import Interrupted, handle_signals, interrupt
from flatlora_diffusion.storage.run_dir import RunDir


class StopRequests:
    """The requests to stop `run`, whose time is counted from here."""

    def __init__(self, run: RunDir, max_seconds: float | None) -> None:
        self._run, self._max_seconds = run, max_seconds
        self._start_time = time.monotonic()
        self._signal: int | None = None

    @contextmanager
    def listen(self) -> Iterator[StopRequests]:
        """Take SIGINT and SIGTERM as requests to stop; a second SIGINT interrupts immediately."""
        with handle_signals(self._remember):
            yield self

    def reason(self) -> str | None:
        """The reason to stop now, or None."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if any(file.exists() for file in self._run.stop_files):
            return "the stop file"
        if self._max_seconds is not None and time.monotonic() - self._start_time >= self._max_seconds:
            return f"max_train_seconds={self._max_seconds:g}"
        return None

    def raise_if_signaled(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._signal is not None:
            raise Interrupted(self._signal)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            interrupt(number, frame)
        self._signal = number
