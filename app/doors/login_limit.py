"""How often a password may be guessed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

WRONG_PER_CLIENT = 5
WRONG_OVERALL = 50
WINDOW_SECONDS = 15 * 60


class LoginLimit:
    """Remembers the logins that failed in the last WINDOW_SECONDS; after too many of a client, or of all, none is let
    try. One that is still being checked counts as failed, so that many at once are no way around it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: list[tuple[float, str]] = []  # when, by whom; the oldest first

    def seconds_to_wait(self, client: str) -> int:
        """Until `client` may try again; 0 when it may now."""
        start = self._clock() - WINDOW_SECONDS
        self._failed = [one for one in self._failed if one[0] > start]
        own = [when for when, who in self._failed if who == client]
        full = [
            times[-limit]
            for times, limit in ((own, WRONG_PER_CLIENT), ([when for when, _ in self._failed], WRONG_OVERALL))
            if len(times) >= limit
        ]
        return math.ceil(max(full) - start) if full else 0

    def begin(self, client: str) -> None:
        """A password of `client` is being checked."""
        self._failed.append((self._clock(), client))

    def succeed(self, client: str) -> None:
        """It was right: what `client` has failed before is forgotten."""
        self._failed = [one for one in self._failed if one[1] != client]
