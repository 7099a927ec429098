"""The rate limit of login attempts, per client."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass

FREE_TRIES = 5  # tries of a client before its next one has to wait
MAX_PAUSE = 30  # seconds between two later tries
MAX_WAIT = 2 * MAX_PAUSE  # seconds; what would wait longer is refused
FORGET_AFTER = 15 * 60  # seconds without a try


@dataclass
class _Tries:
    """The attempts of one client since its last correct password, and the time of its next one."""

    count: int
    next_at: float


class LoginLimit:
    """Schedules login attempts: the first ones immediately, later ones after pauses of 1, 2, 4 ... seconds.

    Clients do not wait for each other, so one who guesses passwords locks nobody else out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tries: dict[str, _Tries] = {}
        self._forget_at = 0.0

    def seconds_to_wait(self, client: str) -> float:
        """Seconds until this attempt of `client` may be checked; above MAX_WAIT it is to be rejected.

        The attempt counts as wrong until `succeed`, so that parallel attempts do not bypass the limit.
        """
        now = self._clock()
        self._forget(now)
        tries = self._tries.setdefault(_network(client), _Tries(0, now))
        wait = max(0.0, tries.next_at - now)
        if wait <= MAX_WAIT:
            tries.count += 1
            tries.next_at = now + wait + _pause(tries.count)
        return wait

    def succeed(self, client: str) -> None:
        """The password was right: the tries of `client` are forgotten."""
        self._tries.pop(_network(client), None)

    def _forget(self, now: float) -> None:
        if now >= self._forget_at:  # not at each try: there may be many clients
            self._tries = {who: tries for who, tries in self._tries.items() if tries.next_at + FORGET_AFTER > now}
            self._forget_at = now + MAX_PAUSE


def _pause(count: int) -> float:
    late = min(count - FREE_TRIES, MAX_PAUSE)  # so that the power stays a number
    return min(2.0**late, MAX_PAUSE) if late >= 0 else 0.0


def _network(client: str) -> str:
    """The address of one client: an IPv4 address, or a /64 network of IPv6."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv4Address):
        return client
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))
