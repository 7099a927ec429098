"""What a run tells of itself: one file of JSON objects, a line each, appended; and which of them count."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """Append one event, flushed, so that a reader or a crash never sees less than what has happened."""
    with open(path, "ab+") as handle:
        if handle.tell() > 0:
            handle.seek(-1, os.SEEK_END)
            if handle.read() != b"\n":  # a power cut or a full disk cut the last event off: it costs only itself
                handle.write(b"\n")
        handle.write(json.dumps(event).encode() + b"\n")


def read_events(path: Path) -> list[Event]:
    """All complete events so far; lines that were only half written are left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def count(counted: dict[int, Event], event: Event, kind: str) -> None:
    """Put an event of this kind to those that count, by the steps done with it; the last one told is the last.

    What came after the step that a run was resumed from counts no more.
    """
    if event["event"] == "resumed":
        for later in [done for done in counted if done > event["step"]]:
            del counted[later]
    elif event["event"] == kind:
        done = event["step"] + (kind == "step")  # those alone are told by their number, which begins at 0
        counted.pop(done, None)
        counted[done] = event


def counting(events: Iterable[Event], kind: str) -> list[Event]:
    """The events of a kind that count, one for each step, in the order of these."""
    counted: dict[int, Event] = {}
    for event in events:
        count(counted, event, kind)
    return [counted[done] for done in sorted(counted)]
