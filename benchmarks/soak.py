"""Does a killed run lose anything? `python -m benchmarks.soak --kills 50 --seed 0`

Kills a short run on the tiny base at seeded moments of all its phases, by signals, a full disk, a read-only folder, or
a second run in its folder; then resumes it, or starts it again where nothing was there to resume. The finished LoRA
must equal the unbroken run's bit for bit, the user's files in image and run folder must be as they were, and exit
codes and messages as docs/flags.md promises. Needs root on Linux for the disks, Linux for speed. Exit code 1 for any
failure. Prints a table; with `--output` writes JSON too.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.short_run import CAN_FORK, STEPS, Scene, Started, ready_to_start
from benchmarks.soak_disk import break_disk, means, mend_disk, own_disk
from benchmarks.soak_judge import (
    CACHING,
    FULL,
    KINDS,
    LOAD,
    PHASES,
    READ_ONLY,
    SIGINT,
    SIGKILL,
    SIGTERM,
    TWO,
    End,
    Kill,
    Timeline,
    lost_steps,
    same_tensors,
    wrong_end,
    wrong_pair,
)
from flatlora_diffusion.storage.run_dir import LORA_FILE

FAILURES = ("lost", "touched", "wrong")
TRIES = 6  # a run may end before its kill, on a machine that is less busy than when the timeline was taken


@dataclass(frozen=True)
class Order:
    """A kill to come: how, in which phase, and how far into it, in [0, 1)."""

    number: int
    kind: str
    phase: str
    share: float
    is_real: bool
    resumes: bool  # whether the second of two runs wants to resume


@dataclass
class Case:
    """A kill that was: the phase it hit, and what went wrong, in a sentence each."""

    order: Order
    phase: str = ""
    exits: list[int | None] = field(default_factory=list)
    said: str = ""
    then: str = ""
    lost: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    half_files: list[str] = field(default_factory=list)  # left behind by writes that were cut off


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the figures and each kill to this JSON file")
    args = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and disks and processes are cleared away
    with tempfile.TemporaryDirectory() as folder, ready_to_start():
        orders = plan(args.kills, args.seed)
        cases = Soak(Path(folder)).all(orders)
    result = {
        "seed": args.seed,
        **figures(cases),
        "means": means(),
        "starts": f"{sum(order.is_real or not CAN_FORK for order in orders)} of {len(orders)} real, the others forks",
        "seconds": round(time.monotonic() - began),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")},
        "cases": [asdict(case) for case in cases],
    }
    print(table(cases, result))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if any(result[name] for name in FAILURES) else 0


def plan(kills: int, seed: int) -> list[Order]:
    """The kills: every kind in every phase once in a seeded order, then again; one in five is of a real start."""
    from flatlora_diffusion.storage.rng import derive_seed

    rng = random.Random(derive_seed(seed, "soak"))
    kinds = [kind for kind in KINDS if kind not in (FULL, READ_ONLY) or kind in means()]
    orders: list[Order] = []
    while len(orders) < kills:
        cells = [(kind, phase) for kind in kinds for phase in PHASES]
        rng.shuffle(cells)
        for kind, phase in cells:
            number = len(orders)
            is_real = phase == LOAD or number % 10 == 9
            orders.append(Order(number, kind, phase, rng.random(), is_real, rng.random() < 0.5))
    return orders[:kills]


class Soak:
    """Carries out kills, each in a folder of its own below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unbroken: dict[bool, tuple[Timeline, Path]] = {}

    def all(self, orders: Sequence[Order]) -> list[Case]:
        cases = []
        for order in orders:
            case = self.case(order)
            cases.append(case)
            problems = "; ".join(text for name in FAILURES for text in getattr(case, name)) or "nothing"
            print(f"{order.number + 1}/{len(orders)} {order.kind} in {case.phase}: {problems}", file=sys.stderr)
        return cases

    def case(self, order: Order) -> Case:
        """Do it, again if the run ended before, and judge what is there afterwards."""
        timeline, unbroken = self.unbroken(order.is_real)
        for attempt in range(TRIES):
            scene = Scene(self.folder / f"kill-{order.number}-{attempt}")
            with ExitStack() as stack:
                if order.kind in (FULL, READ_ONLY):
                    stack.enter_context(own_disk(scene.disk))
                stack.enter_context(scene)
                scene.furnish()
                case = self._killed(replace(order, share=order.share / 2**attempt), scene, timeline)
                if case is not None:
                    self._finish(case, scene, unbroken)
                    return case
        return Case(order, order.phase, wrong=[f"the run ended {TRIES} times before its kill"])

    def unbroken(self, is_real: bool) -> tuple[Timeline, Path]:
        """When an unbroken run gets where, and its folder. Real starts and forks must end in the same bits."""
        if is_real not in self._unbroken:
            scene = Scene(self.folder / f"unbroken-{is_real}", has_users_files=False)
            with scene:
                timeline = _watched(scene, is_real)
            for _, other in self._unbroken.values():
                if not same_tensors(scene.run / LORA_FILE, other / LORA_FILE):
                    raise RuntimeError("a real start and a fork do not end in the same LoRA")
            self._unbroken[is_real] = timeline, scene.run
        return self._unbroken[is_real]

    def _killed(self, order: Order, scene: Scene, timeline: Timeline) -> Case | None:
        """What a run did when this happened to it; None when it had ended before."""
        run = scene.start(is_real=order.is_real)
        after, seconds = timeline.moment(order.phase, order.share)
        while after is not None and run.is_running() and after not in scene.markers():
            time.sleep(0.001)
        time.sleep(seconds)
        phase, at = timeline.phase(scene.markers()), scene.progress()
        if run.is_done():
            run.wait()
            return None
        kill, case = Kill(order.kind, phase, at, STEPS), Case(order, phase)
        if order.kind == TWO:
            self._two(case, run, scene)
            return case
        _strike(kill, run, scene)
        end = self._end(case, run)
        if order.kind in (FULL, READ_ONLY):
            mend_disk(order.kind, scene.disk, scene.run)
        left = scene.left()
        case.wrong += _some(wrong_end(kill, end, left))
        if lost := lost_steps(kill, left):
            case.lost.append(f"{lost} steps of {at.steps}")
        return case

    def _two(self, case: Case, first: Started, scene: Scene) -> None:
        """A second run in the folder. Before the first has begun to write they race, later it waits for the other."""
        is_race = case.phase in (LOAD, CACHING)
        can_pause = hasattr(signal, "SIGSTOP") and not is_race
        if can_pause:
            first.process.send_signal(signal.SIGSTOP)
        resumes = case.order.resumes and scene.checkpoints()
        second = scene.start(*(["--resume_from_checkpoint=latest"] if resumes else []))
        other = self._end(case, second) if can_pause else None
        if can_pause:
            first.process.send_signal(signal.SIGCONT)
        end = self._end(case, first)
        other = other or self._end(case, second)
        case.said = self._portable(other.last_line)
        case.wrong += _some(wrong_pair(end, other, is_race))

    def _finish(self, case: Case, scene: Scene, unbroken: Path) -> None:
        """Resume, or start again if there is nothing to resume, and compare what comes out."""
        if not (0 in case.exits and scene.left().has_lora):
            steps = scene.checkpoints()
            case.then = "resumed" if steps else "started again"
            run = scene.start(*(["--resume_from_checkpoint=latest"] if steps else []))
            end = End(run.wait(), run.text())
            if end.code != 0 or "Traceback" in end.text:
                case.wrong.append(f"{case.then}: exit {end.code}: {end.last_line}")
        for name in (LORA_FILE, f"{unbroken.name}.safetensors"):
            if not same_tensors(scene.run / name, unbroken / name):
                case.lost.append(f"{name} is not that of the unbroken run")
        case.touched += scene.touched()
        case.half_files = sorted(path.name for path in scene.disk.rglob("*.part"))
        for name in FAILURES:
            setattr(case, name, [self._portable(text) for text in getattr(case, name)])

    def _end(self, case: Case, run: Started) -> End:
        end = End(run.wait(), run.text())
        case.exits.append(end.code)
        case.said = self._portable(end.last_line)
        return end

    def _portable(self, text: str) -> str:
        return text.replace(str(self.folder), "FOLDER")


def _watched(scene: Scene, is_real: bool) -> Timeline:
    """A run from its start to its end, undisturbed."""
    scene.furnish()
    began, run = time.monotonic(), scene.start(is_real=is_real)
    seen: dict[str, float] = {}
    is_over = False
    while not is_over:
        is_over = run.is_done()  # asked first, so that no marker of a finished run is missed
        for marker in scene.markers() - seen.keys():
            seen[marker] = time.monotonic() - began
        time.sleep(0.001)
    if run.wait() != 0:
        raise RuntimeError(f"the unbroken run ends with {run.wait()}: {run.text()}")
    return Timeline({**seen, "exit": time.monotonic() - began}, STEPS)


def _strike(kill: Kill, run: Started, scene: Scene) -> None:
    if kill.kind in (SIGINT, SIGTERM):
        run.process.send_signal(signal.Signals[kill.kind])
    elif kill.kind == SIGKILL:
        run.process.kill()
    else:
        break_disk(kill.kind, scene.disk, scene.run, run.process)


def _some(problem: str | None) -> list[str]:
    return [] if problem is None else [problem]


def figures(cases: Sequence[Case]) -> dict[str, Any]:
    """Kills and failures, in all and by kind and phase."""
    rows = Counter((case.order.kind, case.phase) for case in cases)
    return {
        **_counted(cases),
        "rows": [
            {"kind": kind, "phase": phase, **_counted([c for c in cases if (c.order.kind, c.phase) == (kind, phase)])}
            for kind, phase in sorted(rows, key=lambda row: (KINDS.index(row[0]), PHASES.index(row[1])))
        ],
    }


def _counted(cases: Sequence[Case]) -> dict[str, int]:
    return {"kills": len(cases), **{name: sum(bool(getattr(case, name)) for case in cases) for name in FAILURES}}


def table(cases: Sequence[Case], result: dict[str, Any]) -> str:
    """The figures as Markdown: a row for each kind and phase, and one for all."""
    lines = [
        "| kind | phase | kills | lost | user's files touched | wrong exit or message |",
        "|---|---|---|---|---|---|",
    ]
    total = {"kind": "all", "phase": "", **_counted(cases)}
    for row in (*result["rows"], total):
        lines.append("| " + " | ".join(str(row[name]) for name in ("kind", "phase", "kills", *FAILURES)) + " |")
    lines += [f"{kind}: {text}" for kind, text in result["means"].items()]
    missing = [kind for kind in (FULL, READ_ONLY) if kind not in result["means"]]
    lines += [f"{kind}: left out, this system has no means for it" for kind in missing]
    lines.append(f"half-written files left behind: by {sum(bool(c.half_files) for c in cases)} kills")
    return "\n".join([*lines, f"{result['starts']}; {result['seconds']} s"])


if __name__ == "__main__":
    sys.exit(main())
