"""Does Flat-LoRA generalize better than LoRA? The paper's image experiment at the size of the tiny base.

    python -m benchmarks.paper_text_to_image --work FOLDER

One factor at a time around (rank 4, sigma 0.1, cosine), five seeds, each Flat-LoRA paired with the LoRA of its rank
and seed; then both methods tuned with equally many trials. Settings are chosen on the icons `search`, checkpoints on
`checkpoint`, and everything published is measured on `report`; no two of them share an icon. Finished runs are not
trained again. Needs npm and the `recipe` extra, for the icons. Writes paper_text_to_image.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper_icons import make_icon_sets, training_images
from flatlora_diffusion.compare.arms import Arm, PlannedRun, parse_arm, plan
from flatlora_diffusion.compare.losses import UNGROUPED, ImageSet, LossEvaluator, groups_of
from flatlora_diffusion.compare.nulls import OTHER_DRAWS, SECOND_EPS, SIGMA_0, nulls_of
from flatlora_diffusion.compare.paired import paired_difference
from flatlora_diffusion.config import ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.ground.seeds import derive_seed
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.pipeline import load_sdxl
from flatlora_diffusion.training.trainer import train

RESULT = Path(__file__).with_suffix(".json")
SEEDS, TUNED_SEEDS = range(5), range(100, 105)
POINTS = 3  # checkpoints of a run
DRAWS = {"train": 4, "search": 1, "checkpoint": 1, "report": 1, "flat": 1}
SETTINGS = {
    "pretrained_model_name_or_path": "tiny",
    "rank": 4,
    "max_train_steps": 300,
    "train_batch_size": 2,
    "learning_rate": 1e-3,
    "caption_dropout": 0.1,
    "random_flip": True,
    "cache_latents": True,
    "save_dtype": "fp32",
    "report_to": "none",
    "perturb_draw": "full",
    "perturb_norm_every": 1,
}
# Each arm and the LoRA that it is paired with.
PAIRS = {
    "flat-lora": "lora",
    "flat-lora:perturb_noise=iid": "lora",
    "flat-lora:sigma_schedule=constant": "lora",
    "flat-lora:sigma=0.05": "lora",
    "flat-lora:sigma=0.15": "lora",
    "flat-lora:sigma=0.2": "lora",
    "flat-lora:rank=1": "lora:rank=1",
    "flat-lora:rank=16": "lora:rank=16",
}
TRIALS = 6  # settings tried for each method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for icons, runs and losses; kept")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = args.work.resolve()
    sets = make_icon_sets(work / "npm", work / "icons")
    config = TrainConfig.from_dict(
        {**SETTINGS, "instance_data_dir": str(training_images()), "output_dir": str(work / "runs")}
    )
    arms = [parse_arm(key) for key in dict.fromkeys([*PAIRS.values(), *PAIRS])]
    nulls = [null.arm for null in nulls_of(arms, SEEDS[0])]
    main_runs = plan(config, arms, SEEDS, POINTS) + plan(config, nulls, SEEDS[:1], POINTS)
    tuning = _trials(config.replace(output_dir=str(work / "tuning")))
    _say_estimate(config, len(main_runs) + sum(map(len, tuning.values())) + 2 * len(TUNED_SEEDS), work)
    evaluators = {names: _evaluator(work, {name: sets.get(name) for name in names}) for names in _STAGES}
    _train_and_measure(main_runs, evaluators)
    best = {method: _best(trials, evaluators) for method, trials in tuning.items()}
    tuned = plan(config.replace(output_dir=str(work / "tuned")), list(best.values()), TUNED_SEEDS, POINTS)
    _train_and_measure(tuned, evaluators)
    result = _result(main_runs, tuning, tuned, best, evaluators, args.threads)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {RESULT}; `python -m benchmarks.paper_text_to_image_page` makes docs/images.md of it")


_STAGES: tuple[tuple[str, ...], ...] = (("train", "checkpoint"), ("search",), ("report", "flat"))
Evaluators = Mapping[tuple[str, ...], LossEvaluator]


def _evaluator(work: Path, folders: Mapping[str, Path | None]) -> LossEvaluator:
    sdxl = load_sdxl(ModelConfig("tiny"), torch.device("cpu"), torch.float32)
    sets = {}
    for name, folder in folders.items():
        where = training_images() if folder is None else folder
        samples = load_samples(where).samples
        sets[name] = ImageSet(samples, groups_of(where, samples), DRAWS[name])
    return LossEvaluator(sdxl, Objective(sdxl.scheduler), sets, sdxl.resolution, work / "losses")


def _train_and_measure(runs: Sequence[PlannedRun], evaluators: Evaluators) -> None:
    began = time.monotonic()
    for number, planned in enumerate(runs):
        _train(planned)
        _measure_run(planned, evaluators)
        seconds = time.monotonic() - began
        print(f"{number + 1}/{len(runs)} {planned.arm.key} seed {planned.seed}: {seconds:.0f} s", flush=True)


def _train(planned: PlannedRun) -> None:
    if planned.is_finished:
        return
    train(planned.config.replace(resume_from_checkpoint="latest") if planned.is_begun else planned.config)


def _measure_run(planned: PlannedRun, evaluators: Evaluators) -> dict[str, Any]:
    """Everything about one run; measured once and kept."""
    steps = planned.run.steps()
    points = []
    for step, lora in planned.files.items():
        seconds = statistics.median(event["seconds"] for event in steps) * step
        losses = evaluators["train", "checkpoint"].losses(lora)
        points.append({"step": step, "seconds": seconds, **{name: found[UNGROUPED] for name, found in losses.items()}})
    found = evaluators["report", "flat"].losses(planned.lora)
    chosen = min(points, key=lambda point: point["checkpoint"])
    chosen_loss = evaluators["report", "flat"].losses(planned.files[int(chosen["step"])])["report"][UNGROUPED]
    rises = evaluators["train", "checkpoint"].rises(planned.lora, "train", 0.1, 4)
    return {
        "arm": planned.arm.key,
        "seed": planned.seed,
        "points": points,
        "report": found["report"],
        "flat": found["flat"],
        "chosen": {"step": chosen["step"], "report": chosen_loss},
        "rise": statistics.fmean(rises),
        "draws": [event["draws"] for event in steps][:: max(1, len(steps) // 10)],
        "start": next(event for event in planned.run.events() if event["event"] == "start"),
    }


def _trials(config: TrainConfig) -> dict[str, list[PlannedRun]]:
    """Equally many settings of each method, drawn by key from its grid, which for Flat-LoRA has sigma too."""
    shared = {
        "learning_rate": (5e-4, 1e-3, 2e-3),
        "max_train_steps": (150, 300, 450),
        "rank": (2, 4, 8),
        "lora_dropout": (0.0, 0.1),
        "adam_weight_decay": (1e-4, 1e-2),
        "lora_target_modules": ("attn", "attn+ff"),
    }
    flat = {"sigma": (0.03, 0.05, 0.1, 0.15)}
    trials = {}
    for method, grid in (("lora", shared), ("flat-lora", shared | flat)):
        keys = []
        for trial in range(TRIALS):
            picked = {
                name: values[derive_seed(0, "trial", method, trial, name) % len(values)]
                for name, values in grid.items()
            }
            keys.append(f"{method}:" + ",".join(f"{name}={value}" for name, value in picked.items()))
        trials[method] = plan(config, [parse_arm(key) for key in keys], [50], 1)
    return trials


def _best(trials: Sequence[PlannedRun], evaluators: Evaluators) -> Arm:
    """The arm of the trial with the lowest loss on the icons `search`."""
    for number, planned in enumerate(trials):
        _train(planned)
        print(f"trial {number + 1}/{len(trials)} {planned.arm.key}: {_search_loss(planned, evaluators):.5f}")
    return min(trials, key=lambda planned: _search_loss(planned, evaluators)).arm


def _search_loss(planned: PlannedRun, evaluators: Evaluators) -> float:
    return evaluators["search",].losses(planned.lora)["search"][UNGROUPED]


def _result(
    main_runs: Sequence[PlannedRun],
    tuning: Mapping[str, Sequence[PlannedRun]],
    tuned: Sequence[PlannedRun],
    best: Mapping[str, Arm],
    evaluators: Evaluators,
    threads: int,
) -> dict[str, Any]:
    runs = {(one.arm.key, one.seed): _measure_run(one, evaluators) for one in (*main_runs, *tuned)}
    pairs = [_paired(runs, arm, against, SEEDS) for arm, against in PAIRS.items()]
    lora, flat = best["lora"].key, best["flat-lora"].key
    first = SEEDS[0]
    nulls = {}
    for key, against in {SIGMA_0: "lora", OTHER_DRAWS: "lora", SECOND_EPS: "flat-lora"}.items():
        one, other = (runs[arm, first]["report"][UNGROUPED] for arm in (key, against))
        nulls[key] = {"against": against, "report": one - other}
    return {
        "settings": SETTINGS,
        "base": {**evaluators["report", "flat"].losses(None), **evaluators["train", "checkpoint"].losses(None)},
        "icons": {
            name: len(found.samples) for evaluator in evaluators.values() for name, found in evaluator.sets.items()
        },
        "pairs": pairs,
        "nulls": nulls,
        "tuned": _paired(runs, flat, lora, TUNED_SEEDS),
        "trials": {
            method: [{"arm": planned.arm.key, "search": _search_loss(planned, evaluators)} for planned in trials]
            for method, trials in tuning.items()
        },
        "runs": list(runs.values()),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {threads} thread(s)",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")},
        "date": time.strftime("%Y-%m-%d"),
    }


def _paired(runs: Mapping[tuple[str, int], Any], arm: str, against: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The paired differences at the end, at the checkpoints chosen on `checkpoint`, and of all else measured."""

    def differences(read: Any) -> dict[str, Any]:
        found = paired_difference(
            [read(runs[arm, seed]) for seed in seeds], [read(runs[against, seed]) for seed in seeds]
        )
        return {**asdict(found), "n": found.n}

    return {
        "arm": arm,
        "against": against,
        "report": differences(lambda run: run["report"][UNGROUPED]),
        "train": differences(lambda run: run["points"][-1]["train"]),
        "flat": differences(lambda run: run["flat"][UNGROUPED]),
        "rise": differences(lambda run: run["rise"]),
        "chosen": differences(lambda run: run["chosen"]["report"]),
        "groups": {
            group: differences(lambda run, group=group: run["report"][group])
            for group in runs[arm, seeds[0]]["report"]
            if group != UNGROUPED
        },
    }


def _say_estimate(config: TrainConfig, runs: int, work: Path) -> None:
    """Time a few steps and print what the whole will take."""
    trial = config.replace(max_train_steps=12, seed=0, output_dir=str(work / "estimate"))
    train(trial)
    events = PlannedRun(parse_arm("flat-lora"), 0, trial).run.events()
    seconds = statistics.median(event["seconds"] for event in events if event["event"] == "step")
    steps = int(SETTINGS["max_train_steps"])  # type: ignore[call-overload]
    # Measuring forwards about as many images as 120 steps train on, at a third of the cost of each.
    print(f"{runs} runs of {steps} steps at {seconds:.3f} s: about {runs * seconds * (steps + 180) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
