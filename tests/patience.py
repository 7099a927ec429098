"""How tests wait for what other processes do: until it is there, or until what has to do it has ended.

How fast a machine is decides no test. `HANGS` is no limit for what is slow: what takes that long does not go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
HANGS = 1800.0  # seconds
PATIENCE = 120_000  # milliseconds, of a browser: until what a page does not show counts as missing


def wait_until(
    found: Callable[[], T | None], is_alive: Callable[[], bool] = lambda: True, told: Callable[[], object] = lambda: ""
) -> T:
    """What `found` returns, once it is true.

    Raises AssertionError with what `told` returns when `is_alive` is false before, or after `HANGS` seconds.
    """
    end = time.monotonic() + HANGS
    while True:
        was_alive = is_alive()
        if value := found():
            return value
        assert was_alive, f"it has ended: {told()}"
        assert time.monotonic() < end, f"it hangs: {told()}"
        time.sleep(0.05)
