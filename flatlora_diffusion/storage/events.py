"""The event log of a run: a JSON Lines file that is only appended to, and the events that resumes leave valid."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """Append one event and flush it."""
    with open(path, "ab+") as handle:
        if handle.tell() > 0:
            handle.seek(-1, os.SEEK_END)
            if handle.read() != b"\n":  # a power cut or a full disk truncated the last event
                handle.write(b"\n")
        handle.write(json.dumps(event).encode() + b"\n")


def read_events(path: Path) -> list[Event]:
    """Return all complete events so far, without truncated lines."""
    if not path.exists():
        return []
    events = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            events.append(json.loads(line))
    return events


def apply_event(by_step: dict[int, Event], event: Event, kind: str) -> None:
    """Add an event of this kind to `by_step`, keyed by the number of completed steps; the latest comes last.

    A `resumed` event removes the events after the step that the run was resumed from.
    """
    if event["event"] == "resumed":
        for later in [done for done in by_step if done > event["step"]]:
            del by_step[later]
    elif event["event"] == kind:
        done = event["step"] + (kind == "step")  # only `step` events have an index, which starts at 0
        by_step.pop(done, None)
        by_step[done] = event


def valid_events(events: Iterable[Event], kind: str) -> list[Event]:
    """Return the valid events of a kind, one per step, ordered by step."""
    by_step: dict[int, Event] = {}
    for event in events:
        apply_event(by_step, event, kind)
    return [by_step[done] for done in sorted(by_step)]
