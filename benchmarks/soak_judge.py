"""What a kill may leave: the exit codes and sentences that are promised, and what must not be lost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LOAD, CACHING, BASE, STEP, PREVIEW = "load", "caching", "base previews", "steps", "previews"
CHECKPOINT, LORA, LAST, CARD = "checkpoint", "final LoRA", "final previews", "card and upload"
PHASES = (LOAD, CACHING, BASE, STEP, PREVIEW, CHECKPOINT, LORA, LAST, CARD)
BEFORE_STEPS = (LOAD, CACHING, BASE)
AFTER_STEPS = (LORA, LAST, CARD)

SIGINT, SIGTERM, SIGKILL, FULL, READ_ONLY, TWO = (
    "SIGINT",
    "SIGTERM",
    "SIGKILL",
    "full disk",
    "read-only",
    "two at once",
)
KINDS = (SIGINT, SIGTERM, SIGKILL, FULL, READ_ONLY, TWO)


@dataclass(frozen=True)
class Left:
    """What a run left in its folder: the steps of its checkpoints, and whether the finished LoRA is there."""

    checkpoints: list[int]
    has_lora: bool

    def kept(self, total: int) -> int:
        """How many of the steps need not be done again."""
        return total if self.has_lora else max(self.checkpoints, default=0)


@dataclass(frozen=True)
class Progress:
    """How far a run had come: the steps it has taken and what is on disk."""

    steps: int
    left: Left


@dataclass(frozen=True)
class Kill:
    """What was done to a run of `total` steps, in which phase, and how far it was."""

    kind: str
    phase: str
    at: Progress
    total: int

    @property
    def is_late(self) -> bool:
        """Whether the run may have finished before it could hear of it."""
        return self.phase in AFTER_STEPS or self.at.steps >= self.total - 1


@dataclass(frozen=True)
class End:
    """How a process ended: its exit code, None if it hung, negative for a signal; and what it said."""

    code: int | None
    text: str

    @property
    def last_line(self) -> str:
        return next((line for line in reversed(self.text.splitlines()) if line.strip()), "").strip()


def phase_of(marker: str, steps: int) -> str:
    """What a run is doing while `marker` is the next that will be there."""
    if marker == f"preview-{steps}":
        return LAST
    if marker == "preview-0":
        return BASE
    kinds = {"cache": LOAD, "start": CACHING, "step": STEP, "preview": PREVIEW, "checkpoint": CHECKPOINT, "lora": LORA}
    return kinds.get(marker.split("-")[0], CARD)


@dataclass(frozen=True)
class Timeline:
    """The markers of an unbroken run in their order, and when each was first seen, in seconds from its start."""

    seen: dict[str, float]
    total: int  # steps

    def phase(self, markers: set[str]) -> str:
        """What a run with these markers is doing."""
        return phase_of(next((marker for marker in self.seen if marker not in markers), "exit"), self.total)

    def moment(self, phase: str, share: float) -> tuple[str | None, float]:
        """When `share` of the phase's time has gone by, over all its occurrences: seconds after which marker."""
        names: list[str | None] = [None, *self.seen]
        spans = [
            (before, self.seen[after] - (self.seen[before] if before else 0.0))
            for before, after in zip(names, self.seen, strict=False)
            if phase_of(after, self.total) == phase
        ]
        if not spans:
            raise ValueError(f"the unbroken run has no phase {phase!r}")
        left = share * sum(seconds for _, seconds in spans)
        for before, seconds in spans[:-1]:
            if left < seconds:
                return before, left
            left -= seconds
        return spans[-1][0], left


def wrong_end(kill: Kill, end: End, left: Left) -> str | None:
    """What is wrong with the end of a killed run, or None."""
    if end.code is None:
        return "hung"
    if "Traceback" in end.text:
        return f"a traceback, exit {end.code}: {end.last_line}"
    if end.code == 0:  # too late to be heard, or with nothing left to write
        return None if left.has_lora and kill.is_late else "exit 0, as if nothing had been"
    if end.code not in _codes(kill):
        return f"exit {end.code}: {end.last_line}"
    return None if end.code < 0 or kill.kind == SIGKILL else wrong_words(kill.kind, end, left)


def wrong_words(kind: str, end: End, left: Left) -> str | None:
    """What is wrong with the sentence at the end, or None."""
    line = end.last_line
    if end.code in (1, 2, 3) and (not line.startswith("error: ") or end.text.count("error: ") != 1):
        return f"not one sentence: {line}"
    if kind == TWO:
        return None if re.search("another|already|in use", line) else f"does not say whose folder it is: {line}"
    if kind not in (FULL, READ_ONLY):
        return None if re.search("stopped|interrupted", line) else f"does not say that it was stopped: {line}"
    if not re.search(r"cannot be (written|made)|is on a disk with .* free", line):
        return f"does not say what cannot be written: {line}"
    kept = f"checkpoint-{left.checkpoints[-1]}" if left.checkpoints else ""
    if kept not in line and not (left.has_lora and "LoRA" in line):
        return f"does not say that {kept} is kept: {line}"
    return None


def wrong_pair(first: End, second: End, is_race: bool) -> str | None:
    """What is wrong with the ends of two runs in one folder, or None. In a race either may be the one."""
    if is_race and first.code != 0:
        first, second = second, first
    for end, code, which in ((first, 0, "the run itself"), (second, 2, "the other")):
        if "Traceback" in end.text:
            return f"a traceback of {which}, exit {end.code}: {end.last_line}"
        if end.code != code:
            return f"exit {end.code}, not {code}, of {which}: {end.last_line}"
    return wrong_words(TWO, second, Left([], has_lora=True))


def lost_steps(kill: Kill, left: Left) -> int:
    """How many steps have to be done again although they were safe: all of them, if the run could say goodbye."""
    due = kill.at.steps if kill.kind in (SIGINT, SIGTERM) else kill.at.left.kept(kill.total)
    return max(0, due - left.kept(kill.total))


def same_tensors(one: Path, two: Path) -> bool:
    """Whether two LoRA files hold the same tensors bit for bit; not if one of them is missing or broken."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        a, b = load_file(one), load_file(two)
    except (OSError, SafetensorError):
        return False
    return a.keys() == b.keys() and all(
        value.dtype == b[name].dtype and torch.equal(value, b[name]) for name, value in a.items()
    )


def _codes(kill: Kill) -> tuple[int, ...]:
    """The exit codes that are promised besides 0."""
    outside = kill.phase in BEFORE_STEPS or kill.is_late
    if kill.kind == SIGKILL:
        return (-9, 1)  # 1: as Windows ends a process
    if kill.kind == SIGINT:
        return (3, 130) if outside else (3,)
    if kill.kind == SIGTERM:
        silent = (-15,) if kill.phase == LOAD else ()  # before the program has come to its own first line
        return (3, 143, *silent) if outside else (3,)
    return (1, 2) if kill.phase in (LOAD, CACHING) else (1,)
