"""The expected time of the parts of `evidence`, from the speeds measured so far on this machine.

A part takes the remaining steps of its trainings times the seconds of a step, and the samples that its pictures and
losses pass through the denoiser times the seconds of a sample in pictures and in losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.evaluator import RunEvaluator
from flatlora_diffusion.compare.picture_grid import grid_items
from flatlora_diffusion.compare.progress import WorkItem
from flatlora_diffusion.compare.timing import duration_text, step_seconds, training_seconds
from flatlora_diffusion.storage.run_dir import append_event, read_events

logger = logging.getLogger(__name__)

TIMING = "timing.jsonl"
_ENOUGH_STEPS = 10  # of an arm, for the first estimate from its own steps
Kind = Literal["pictures", "losses"]
KINDS: tuple[Kind, ...] = ("pictures", "losses")


class PlannedPart(NamedTuple):
    """The runs of a part, including those that it shares with the parts before."""

    name: str
    arm_runs: Sequence[PlannedRun]
    control_runs: Sequence[PlannedRun]


class Speed(NamedTuple):
    """What drawing or measuring has taken so far: pictures or losses, samples through the denoiser, and seconds."""

    number: int
    passes: int
    seconds: float


class Forecast:
    """Estimates the time that each part still takes, and keeps the measured speeds in `folder`.

    Args:
        seconds_left: Returns the seconds until `--hours` are over; None without a limit.

    Attributes:
        pass_seconds: The seconds of a sample's pass through the denoiser, for use until better speeds are measured.
    """

    def __init__(
        self, parts: Sequence[PlannedPart], folder: Path, seconds_left: Callable[[], float | None] = lambda: None
    ) -> None:
        self._parts, self._folder, self.seconds_left = parts, folder, seconds_left
        self._work: list[dict[Kind, int]] = [dict.fromkeys(KINDS, 0) for _ in parts]
        self.pass_seconds = 0.0
        self._known_arms: set[str] = set()

    def count(self, evaluator: RunEvaluator) -> None:
        """Count the samples of all parts that are not measured yet."""
        first = self._parts[0].arm_runs[0]
        items = [*evaluator.base_items(), *grid_items(first, evaluator)]
        seen: set[Path] = set()
        for index, part in enumerate(self._parts):
            for planned in _new(part.arm_runs, seen):
                items += evaluator.measurement_items(planned)
            for planned in _new(part.control_runs, seen):
                items += evaluator.control_items(planned)
            self._work[index] = {kind: sum(item.passes for item in items if _kind(item) == kind) for kind in KINDS}
            items = []

    def item_done(self, item: WorkItem, seconds: float) -> None:
        """Record the time of an item and subtract it from the first part with such work."""
        kind = _kind(item)
        number = item.pictures or item.passes
        self._folder.mkdir(parents=True, exist_ok=True)
        event = {"event": kind, "number": number, "passes": item.passes, "seconds": round(seconds, 3)}
        append_event(self._folder / TIMING, event)
        work = next((work for work in self._work if work[kind]), None)
        if work is not None:
            work[kind] = max(0, work[kind] - item.passes)

    def watch(self) -> None:
        """Log the estimates when an arm has taken its first ten steps."""
        known = {run.arm.key for run in self._runs if len(run.timed_steps) >= _ENOUGH_STEPS}
        if known - self._known_arms:
            self._known_arms |= known
            self.log()

    def part_seconds(self) -> list[float]:
        """Estimate the seconds that each part still takes, 0 for a finished one."""
        speeds, runs = measured_speeds(self._folder), self._runs
        per_pass = {
            kind: speeds[kind].seconds / speeds[kind].passes if kind in speeds else self.pass_seconds for kind in KINDS
        }
        seen: set[Path] = set()
        seconds = []
        for part, work in zip(self._parts, self._work, strict=True):
            pending = list(_new([*part.arm_runs, *part.control_runs], seen))
            training = training_seconds(pending, runs, self.pass_seconds)
            seconds.append(training + sum(work[kind] * per_pass[kind] for kind in KINDS))
        return seconds

    def log(self) -> None:
        """Log the measured speeds and the estimate of each part to come."""
        for line in self.lines():
            logger.info("%s", line)

    def lines(self) -> Iterator[str]:
        """Yield a line of measured speeds, then a line for each part that is not finished."""
        speeds = [f"{seconds:.2f} s per step of {arm}" for arm, seconds in step_seconds(self._runs).items()]
        words: dict[Kind, str] = {"pictures": "picture", "losses": "loss"}
        for kind, speed in measured_speeds(self._folder).items():
            speeds.append(f"{speed.seconds / speed.number:.2f} s per {words[kind]}")
        if speeds:
            yield f"Measured: {', '.join(speeds)}"
        left, total = self.seconds_left(), 0.0
        for number, (part, seconds) in enumerate(zip(self._parts, self.part_seconds(), strict=True), 1):
            total += seconds
            if seconds > 0:
                too_late = number > 1 and left is not None and total > left
                note = f"; does not fit in the {duration_text(max(left or 0, 0))} left of --hours" if too_late else ""
                yield f"Part {number} of {len(self._parts)}, {part.name}: about {duration_text(seconds)}{note}"

    @property
    def _runs(self) -> list[PlannedRun]:
        seen: set[Path] = set()
        return [run for part in self._parts for run in _new([*part.arm_runs, *part.control_runs], seen)]


def measured_speeds(folder: Path) -> dict[Kind, Speed]:
    """Read what drawing and measuring have taken in a comparison's folder, also before a stop."""
    events = read_events(folder / TIMING)
    speeds: dict[Kind, Speed] = {}
    for kind in KINDS:
        rows = [event for event in events if event["event"] == kind]
        if rows:
            number, passes, seconds = (sum(row[name] for row in rows) for name in ("number", "passes", "seconds"))
            speeds[kind] = Speed(number, passes, seconds)
    return speeds


def _kind(item: WorkItem) -> Kind:
    return "pictures" if item.pictures else "losses"


def _new(runs: Iterable[PlannedRun], seen: set[Path]) -> Iterator[PlannedRun]:
    """Yield the runs whose folders are not in `seen`, and add them."""
    for planned in runs:
        if planned.run.folder not in seen:
            seen.add(planned.run.folder)
            yield planned
