"""The progress of a run, read from its events; each read continues after the last one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatlora_diffusion.storage.run_dir import RunDir, apply_event

RECENT_STEPS = 50


@dataclass(frozen=True)
class Progress:
    """`step` optimizer steps of `total` are done; times in seconds. `last` is the last event that ends a run.

    end: the step of the result of a finished run, which held-out images may have chosen;
    has_begun: whether all is loaded; has_drawn: whether there are previews.
    """

    step: int = 0
    total: int | None = None
    eta_seconds: float | None = None
    seconds_per_step: float | None = None
    loss: float | None = None
    last: str | None = None
    end: int | None = None
    has_begun: bool = False
    has_drawn: bool = False

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return min(1.0, self.step / self.total) if self.total else 0.0


@dataclass(frozen=True)
class Preview:
    """One preview.

    Attributes:
        step: completed steps; 0 for the base.
        place: index within the previews of the step.
        prompt, seed: None in the events of earlier versions.
    """

    step: int
    place: int
    path: Path
    prompt: str | None
    seed: int | None


class EventLog:
    """The events of one run. Thread-safe."""

    def __init__(self, run: RunDir) -> None:
        self._path, self._images = run.events_file, run.images
        self._lock = threading.Lock()
        self._forget()

    def progress(self, total: int | None) -> Progress:
        """`total`: the run's number of steps, if it is known."""
        with self._lock:
            self._read_on()
            recent = [event["seconds"] for event in list(self._steps.values())[-RECENT_STEPS:]]
            last = next(reversed(self._steps.values()), None)
            if last is None:
                return Progress(
                    total=total, last=self._ending, has_begun=self._has_begun, has_drawn=bool(self._previews)
                )
            done = last["step"] + 1
            speed = sum(recent) / len(recent)
            return Progress(
                step=done,
                total=total,
                eta_seconds=None if total is None else speed * max(0, total - done),
                seconds_per_step=speed,
                loss=last["loss"],
                last=self._ending,
                end=self._end,
                has_begun=True,
                has_drawn=bool(self._previews),
            )

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of each optimizer step; of steps that were done again after a resume, the last."""
        with self._lock:
            self._read_on()
            return sorted((event["step"], event["loss"]) for event in self._steps.values())

    def validation_losses(self) -> list[tuple[int, float]]:
        """(steps done, loss of images not trained on)."""
        with self._lock:
            self._read_on()
            return sorted((event["step"], event["loss"]) for event in self._validation.values())

    def image_losses(self) -> list[dict[str, Any]]:
        """The events with the losses of each training image, in order of steps up to that of the result."""
        with self._lock:
            self._read_on()
            events = [event for _, event in sorted(self._image_losses.items())]
            return [event for event in events if self._end is None or event["step"] <= self._end]

    def previews(self) -> list[Preview]:
        """The previews so far, in order of steps."""
        with self._lock:
            self._read_on()
            return [one for _, event in sorted(self._previews.items()) for one in _previews_of(event, self._images)]

    def _forget(self) -> None:
        self._offset, self._file = 0, 0
        self._steps: dict[int, dict[str, Any]] = {}
        self._validation: dict[int, dict[str, Any]] = {}
        self._image_losses: dict[int, dict[str, Any]] = {}
        self._previews: dict[int, dict[str, Any]] = {}
        self._ending: str | None = None
        self._end: int | None = None
        self._has_begun = False

    def _read_on(self) -> None:
        try:
            with open(self._path, "rb") as file:
                status = self._path.stat()
                if status.st_ino != self._file or status.st_size < self._offset:  # a new run in the same folder
                    self._forget()
                    self._file = status.st_ino
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            self._forget()
            return
        if not whole:
            return
        self._offset += len(whole) + 1
        for line in whole.split(b"\n"):
            try:
                event = json.loads(line)
            except ValueError:  # cut off by a full disk, then gone on
                continue
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        self._has_begun = True
        apply_event(self._steps, event, "step")
        apply_event(self._validation, event, "validation")
        apply_event(self._image_losses, event, "image_losses")
        if kind == "step":
            self._ending = None
        elif kind == "preview":
            self._previews[event["step"]] = event
        elif kind in ("stopped", "finished"):
            self._ending = kind
            self._end = event.get("step") if kind == "finished" else None  # earlier versions told none


def _previews_of(event: dict[str, Any], images: Path) -> Iterator[Preview]:
    names = event["images"]
    prompts, seeds = (event.get(about) or [None] * len(names) for about in ("prompts", "seeds"))
    for place, (name, prompt, seed) in enumerate(zip(names, prompts, seeds, strict=False)):
        yield Preview(event["step"], place, images / Path(name).name, prompt, seed)
