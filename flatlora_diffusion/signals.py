"""SIGINT and SIGTERM: raised as an exception with a message and a shell's exit code, or held back for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal has interrupted the program.

    Attributes:
        number: the signal.
        outcome: the state of the interrupted work, for the message.
    """

    def __init__(self, number: int, outcome: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{outcome and ' '}{outcome}")
        self.number, self.outcome = number, outcome

    @property
    def code(self) -> int:
        """The exit code that a shell gives to a program ended by this signal."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted on SIGINT and SIGTERM, so that files are closed; a second signal ends the process."""
    with handle_signals(interrupt):
        yield


@contextmanager
def hold_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the returned list; a second signal ends the process.

    For code that runs finalizers: Python prints and discards exceptions raised in a finalizer.
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            interrupt(number, frame)
        held.append(number)

    with handle_signals(hold):
        yield held


@contextmanager
def describe_interruption(outcome: Callable[[], str]) -> Iterator[None]:
    """Raise KeyboardInterrupt as Interrupted with `outcome()` in its message, unless an inner block has set it."""
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted) and error.outcome:
            raise
        raise Interrupted(error.number if isinstance(error, Interrupted) else signal.SIGINT, outcome()) from error


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install `handler` for SIGINT and SIGTERM and restore the previous handlers at the end.

    Does nothing outside of the main thread, where Python allows no handlers.
    """
    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in _SIGNALS} if is_main else {}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise Interrupted, and let the next signal end the process."""
    for known in _SIGNALS:
        signal.signal(known, signal.SIG_DFL)
    raise Interrupted(number)
