"""Why a run should end before its last step: a signal, a `stop` file in the run folder, or its time being up."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from flatlora_diffusion.run_dir import RunDir

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))


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
        if self._run.stop_file.exists():
            return "the stop file"
        if self._max_seconds is not None and time.monotonic() - self._began >= self._max_seconds:
            return f"max_train_seconds={self._max_seconds:g}"
        return None

    def __enter__(self) -> Stopping:
        self._run.stop_file.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
