"""The paper's tables on a small model: arms with equal trials, sweeps, seeds in pairs, runs that are kept.

Each arm chooses its settings in as many trials, by the accuracy on a validation split, and is then trained with
further seeds; arms of one seed share first weights, batches and dropout. The sweeps after that change one thing at a
time (`paper_study_arms.py`). Accuracies are on examples of the training's
kind (test) and on shifted ones; differences are paired, with the 95 % interval of Student's t over seeds.

Every run is kept in the result file as soon as it is done, so a stopped study goes on. With --surfaces the loss around
W' of LoRA and Flat-LoRA is drawn for each task, as in the paper's Fig. 6 (`paper_study_surface.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper_study_arms import ARMS, FLAT_SIGMAS, RANKS, SWEEPS, TRIALS, USUAL_SWEEPS, VARIANT_ARMS, Arm, Bout
from benchmarks.paper_study_run import BATCH, Bench, run, sizes
from benchmarks.paper_study_settings import Settings
from benchmarks.paper_study_surface import draw_surfaces
from benchmarks.record import device_name
from flatlora_diffusion.compare.paired import paired_difference
from flatlora_diffusion.ground.versions import versions
from flatlora_diffusion.ground.whole_files import write_json

TUNING_SEED = 100


class Runs:
    """The runs of one file, kept as they are done."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.result: dict[str, Any] = {"runs": {}}
        if file.is_file():
            self.result = json.loads(file.read_text(encoding="utf-8"))

    def get(self, bench: Bench, task: str, settings: Settings, seed: int, only_validation: bool) -> dict[str, Any]:
        """The figures of a run, which is trained unless it is here."""
        stage = "trial" if only_validation else "run"
        key = json.dumps([task, stage, seed, settings.named()])
        runs: dict[str, Any] = self.result["runs"]
        if key not in runs:
            runs[key] = run(bench, settings, seed, only_validation)
            self.save()
            print(f"{task} {stage} seed {seed} {_said(settings)}: {_brief(runs[key])}", flush=True)
        found: dict[str, Any] = runs[key]
        return found

    def save(self) -> None:
        write_json(self._file, self.result)


def parser_of(about: str | None, tasks: Sequence[str], result: Path, steps: int) -> argparse.ArgumentParser:
    """The flags that all studies have; more can be added."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is prepared once; kept")
    parser.add_argument("--result", type=Path, default=result)
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=list(tasks))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="lora has to be among them")
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=USUAL_SWEEPS)
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="of the sweep over them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each arm")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps of each run, {BATCH} examples each")
    parser.add_argument(
        "--surfaces", type=Path, help="folder to draw the loss around W' in, for one seed of each task"
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser


def study(options: argparse.Namespace, bench_of: Callable[[str], Bench]) -> None:
    """All arms and sweeps on each task, `bench_of` its name, into the result file; tables are printed."""
    if "lora" not in options.arms:
        raise SystemExit("--arms needs lora, which the others are compared with")
    if options.surfaces and "flat" not in options.arms:
        raise SystemExit("--surfaces needs flat among --arms: it draws LoRA against Flat-LoRA")
    torch.set_num_threads(options.threads)
    runs = Runs(options.result)
    runs.result |= _made_by(options)
    tables = runs.result.setdefault("tables", {})
    for number, name in enumerate(options.tasks):
        bench = bench_of(name)
        how = {key: getattr(options, key) for key in ("trials", "seeds", "steps")} | {"lr_factor": bench.lr_factor}
        runs.result.setdefault("tasks", {})[name] = {"how": how, "sizes": sizes(bench)}
        arms = {arm: ARMS[arm] for arm in options.arms}
        if "variants" in options.sweeps:
            arms |= VARIANT_ARMS
        chosen = {"lora": _tuned(runs, bench, name, ARMS["lora"], options)}
        print(_cost(runs, name, len(arms), options, len(options.tasks) - number), flush=True)
        chosen |= {arm: _tuned(runs, bench, name, arms[arm], options) for arm in arms}
        tables[name] = _table(
            runs, bench, name, _bouts(chosen, arms, options.sweeps, options.ranks), range(options.seeds)
        )
        runs.save()
        _print(name, tables[name])
        if options.surfaces:
            pair = {"LoRA": chosen["lora"], "Flat-LoRA": chosen["flat"]}
            draw_surfaces(bench, pair, options.surfaces / name)
    print(f"Written: {options.result}")


def _cost(runs: Runs, task: str, arms: int, options: argparse.Namespace, tasks: int) -> str:
    """What the tasks that are left come to, by the trials of LoRA on the first of them."""
    seconds = statistics.fmean(
        seen["whole_seconds"] for key, seen in runs.result["runs"].items() if json.loads(key)[:2] == [task, "trial"]
    )
    swept = sum(len(SWEEPS[name](Settings(lr=1, steps=1), 0.1, options.ranks)) for name in options.sweeps)
    count = arms * options.trials + (arms + swept) * options.seeds
    minutes = tasks * count * seconds / 60
    return f"{task}: {count} runs; {tasks} such tasks are about {minutes:.0f} core-minutes, SAM and eps not counted"


def _tuned(runs: Runs, bench: Bench, task: str, arm: Arm, options: argparse.Namespace) -> Settings:
    """The settings of the trial with the best validation accuracy; of equals, the lower loss."""
    rated = [{**choice, "lr": bench.lr_factor * choice["lr"]} for choice in arm.grid[: options.trials]]
    trials = [Settings(steps=options.steps, **arm.fixed, **choice) for choice in rated]

    def quality(settings: Settings) -> tuple[float, float]:
        seen = runs.get(bench, task, settings, TUNING_SEED, only_validation=True)["validation"]
        return seen["accuracy"], -seen["loss"]

    return max(trials, key=quality)


def _bouts(
    chosen: Mapping[str, Settings], arms: Mapping[str, Arm], sweeps: Sequence[str], ranks: Sequence[int] = RANKS
) -> list[Bout]:
    bouts = [Bout(arm, arms[arm].against, settings) for arm, settings in chosen.items()]
    sigma = chosen["flat"].sigma if "flat" in chosen else FLAT_SIGMAS[0]
    return bouts + [bout for name in sweeps for bout in SWEEPS[name](chosen["lora"], sigma, ranks)]


def _table(runs: Runs, bench: Bench, task: str, bouts: Sequence[Bout], seeds: Sequence[int]) -> dict[str, Any]:
    """For each arm its settings, means, and paired differences to its partner on every test."""
    figures: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:  # by seed, so that a study that is stopped has all arms of the seeds that it has
        for bout in bouts:
            seen = runs.get(bench, task, bout.settings, seed, only_validation=False)
            figures.setdefault(bout.arm, []).append(_flattened(seen))
    return {
        bout.arm: {
            "settings": asdict(bout.settings),
            "against": bout.against,
            "mean": {key: statistics.fmean(row[key] for row in figures[bout.arm]) for key in figures[bout.arm][0]},
            "difference": {
                key: asdict(
                    paired_difference(
                        [row[key] for row in figures[bout.arm]], [row[key] for row in figures[bout.against]]
                    )
                )
                for key in figures[bout.arm][0]
            },
        }
        for bout in bouts
    }


def _flattened(seen: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each test, the mean of the shifted ones, the loss's rise and the losses in domain."""
    accuracies = {name: value["accuracy"] for name, value in seen.items() if isinstance(value, dict)}
    shifted = [value for name, value in accuracies.items() if name not in ("train", "validation", "test")]
    losses = {f"{name} loss": seen[name]["loss"] for name in ("train", "test")}
    rest = {name: seen[name] for name in ("rise", "seconds")}
    return {**accuracies, "shifted": statistics.fmean(shifted), **losses, **rest}


def _print(task: str, table: dict[str, Any]) -> None:
    print(f"\n{task}: accuracy in %, difference to the partner with its 95 % interval")
    for arm, row in table.items():
        parts = [
            f"{key} {100 * row['mean'][key]:.2f} {_interval(row['difference'][key])}" for key in ("test", "shifted")
        ]
        print(f"  {arm:24} {'; '.join(parts)}; rise {row['mean']['rise']:.4f}")


def _interval(difference: dict[str, Any]) -> str:
    if difference["low"] is None:
        return f"({100 * difference['mean']:+.2f})"
    return f"({100 * difference['mean']:+.2f} [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}])"


def _said(settings: Settings) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.named().items())


def _brief(seen: dict[str, Any]) -> str:
    accuracies = " ".join(f"{name} {value['accuracy']:.3f}" for name, value in seen.items() if isinstance(value, dict))
    return f"{accuracies} in {seen['whole_seconds']:.1f} s"


def _made_by(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "device": device_name(),
        "threads": options.threads,
        "batch": BATCH,
        "versions": versions(),
    }
