"""`compare`: arms trained as one experiment, measured alike, and the report of it.

compare.html    the verdict, pictures, numbers with intervals, proof: one file that needs no network
compare.json    every figure and hash
compare.md      the table
compare.png     the same prompts and seeds by the base and each arm
ARM/seed-N/     the run folders;  pictures/, measured/: what is not drawn or measured twice
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image

from flatlora_diffusion.compare.arms import Arm, PlannedRun, null_arms, parse_arm, plan, train_planned
from flatlora_diffusion.compare.conditions import shared_conditions
from flatlora_diffusion.compare.evaluator import OWN_METRICS, TRAIN, MetricValues, RunEvaluator
from flatlora_diffusion.compare.findings import Trajectories, Values, metrics_table, paired_rows, verdict
from flatlora_diffusion.compare.material import Material, load_evaluator, read_material
from flatlora_diffusion.compare.nulls import RunOutputs, null_rows
from flatlora_diffusion.compare.overfit import advise
from flatlora_diffusion.compare.page.page import write_compare_page
from flatlora_diffusion.compare.trajectory import TrajectoryPoint
from flatlora_diffusion.config import CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.data.training_set import load_training_set
from flatlora_diffusion.evaluation.finished_runs import check_images, read_runs
from flatlora_diffusion.evaluation.metrics import described
from flatlora_diffusion.gallery.grid import labelled_grid
from flatlora_diffusion.ground.provenance import base_fingerprint
from flatlora_diffusion.ground.run_lock import alone_in
from flatlora_diffusion.ground.saved_settings import portable
from flatlora_diffusion.ground.versions import versions
from flatlora_diffusion.ground.whole_files import write_text
from flatlora_diffusion.sdxl.pipeline import Sdxl

logger = logging.getLogger(__name__)


class ComparisonResult(TypedDict):
    """The contents of compare.json, in JSON's own types: arms by their keys, seeds and strengths as text."""

    settings: dict[str, Any]
    arms: list[dict[str, Any]]
    seeds: list[int]
    metrics: list[dict[str, Any]]
    base: MetricValues
    values: dict[str, dict[str, MetricValues]]
    trajectories: dict[str, dict[str, list[dict[str, Any]]]]
    groups: dict[str, Any]
    paired: list[dict[str, Any]]
    verdict: str
    proof: list[dict[str, Any]]
    nulls: list[dict[str, Any]]
    advice: list[dict[str, Any]]
    pictures: dict[str, Any]
    strengths: dict[str, dict[str, MetricValues]]
    device: str
    versions: dict[str, str]


def compare(config: TrainConfig, own: CompareConfig) -> Path:
    """Train all arms, nulls and seeds below `output_dir`, measure them and write the report; returns the folder.

    Finished runs with the same settings are not trained again. Raises ConfigError for wrong input and for runs that
    cannot be compared, RunError when one could not be trained.
    """
    with alone_in(Path(config.run.output_dir), "output_dir"):
        return _compare(config, own)


def _compare(config: TrainConfig, own: CompareConfig) -> Path:
    material = read_material(config, own)
    out, seed = Path(config.run.output_dir), config.run.seed
    assert seed is not None
    arms = [parse_arm(text) for text in own.arms]
    seeds = range(seed, seed + own.num_seeds)
    main = plan(config, arms, seeds, own.num_checkpoints)
    null = [*_missing(arms), *null_arms(seed, config.adapter.lora_init_seed)]
    nulls = plan(config, null, [seed], own.num_checkpoints)
    for planned in (*main, *nulls):
        train_planned(planned)
    runs = read_runs([str(planned.run.folder) for planned in (*main, *nulls)])  # refuses what does not fit together
    check_images(runs[0], load_training_set(config.data))
    config = config.replace(mixed_precision=main[0].run.config()["mixed_precision"])  # as accelerate decided it
    evaluator, sdxl = load_evaluator(config, [*main, *nulls], material)
    _check_base(config, sdxl, [*main, *nulls])
    result = _measure(_settings(config, own, material), arms, main, nulls, evaluator)
    write_text(out / "compare.json", json.dumps(result, indent=1) + "\n")
    names = {arm.key: arm.name for arm in arms}
    table = metrics_table(names, result["metrics"], result["base"], result["values"])
    write_text(out / "compare.md", table + "\n")
    _save_grid(out, result, {sample.caption for sample in material.sets[TRAIN].samples})
    write_compare_page(result, out)
    return out


def _missing(arms: Sequence[Arm]) -> list[Arm]:
    """LoRA and Flat-LoRA as they are, for the nulls to be compared with, where they are not arms themselves."""
    plain = [parse_arm(key) for key in ("lora", "flat-lora") if key not in {arm.key for arm in arms}]
    return [replace(arm, role="null") for arm in plain]


def _check_base(config: TrainConfig, sdxl: Sdxl, runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError when the base is not the one that the runs were trained on."""
    if config.model.quantize_base is not None:
        return  # they saw its quantized weights, which have another hash
    now = base_fingerprint(sdxl.unet)
    for planned in runs:
        for event in planned.run.events():
            if event["event"] == "start" and event["base"] != now:
                raise ConfigError(
                    f"run {planned.arm.key}, seed {planned.seed} was trained on another base than "
                    f"{config.model.pretrained_model_name_or_path!r} is now: put the base back, or give another "
                    "--output_dir"
                )


def _settings(config: TrainConfig, own: CompareConfig, material: Material) -> dict[str, Any]:
    """The settings of the arms and of the comparison itself, and the image sets by their hashes."""
    mine = {
        name: Path(value).name if name.endswith(("_dir", "_file")) and value else value
        for name, value in asdict(own).items()
    }
    sets = {f"{name} images": f"{len(one.samples)}, {one.sha256[:16]}" for name, one in material.sets.items()}
    return {**portable(config.to_dict()), **mine, **sets}


def _measure(
    settings: dict[str, Any],
    arms: Sequence[Arm],
    main: Sequence[PlannedRun],
    nulls: Sequence[PlannedRun],
    evaluator: RunEvaluator,
) -> ComparisonResult:
    values: dict[str, dict[int, MetricValues]] = {}
    trajectories: dict[str, dict[int, list[TrajectoryPoint]]] = {}
    base = evaluator.base()
    for planned in main:
        logger.info("measuring %s, seed %d", planned.arm.name, planned.seed)
        values.setdefault(planned.arm.key, {})[planned.seed] = evaluator.run(planned)
        trajectories.setdefault(planned.arm.key, {})[planned.seed] = evaluator.trajectory(planned)
    for planned in nulls:
        logger.info("measuring %s", planned.arm.name)
        values.setdefault(planned.arm.key, {})[planned.seed] = evaluator.losses(planned)
    metrics = _metrics([base, *(of_run for by_seed in values.values() for of_run in by_seed.values())])
    differences = paired_rows(arms, [metric["key"] for metric in metrics], values, trajectories)
    first_seed = [planned for planned in main if planned.seed == main[0].seed]
    strengths = {planned.arm.key: evaluator.strengths(planned) for planned in first_seed}
    all_arms = {arm.key: arm for arm in (*arms, *(planned.arm for planned in nulls))}
    outputs = {planned.arm.key: _outputs(planned, evaluator) for planned in (*first_seed, *nulls)}
    return ComparisonResult(
        settings=settings,
        arms=[asdict(arm) for arm in all_arms.values()],
        seeds=list(dict.fromkeys(planned.seed for planned in main)),
        metrics=metrics,
        base=base,
        values=_values_as_json(values),
        trajectories=_trajectories_as_json(trajectories),
        groups=_groups(main, evaluator),
        paired=differences,
        verdict=verdict(differences, {arm.key: arm.name for arm in arms}),
        proof=shared_conditions([*main, *nulls]),
        nulls=null_rows(outputs, values, main[0].seed),
        advice=[_advice(planned, trajectories, strengths) for planned in first_seed],
        pictures=_pictures(first_seed, evaluator),
        strengths={arm: {f"{at:g}": losses for at, losses in by_at.items()} for arm, by_at in strengths.items()},
        device=_device(),
        versions={"python": platform.python_version(), **versions()},
    )


def _metrics(values: Sequence[MetricValues]) -> list[dict[str, Any]]:
    """Name, direction and digits of each measured key, our own metrics first."""
    keys = dict.fromkeys(key for of_run in values for key in of_run)
    ours = [dict(metric._asdict()) for metric in OWN_METRICS if metric.key in keys]
    return ours + described([key for key in keys if key not in {metric.key for metric in OWN_METRICS}])


def _advice(
    planned: PlannedRun, trajectories: Trajectories, strengths: Mapping[str, Mapping[float, MetricValues]]
) -> dict[str, Any]:
    losses = {strength: values["heldout_loss"] for strength, values in strengths[planned.arm.key].items()}
    advice = advise(trajectories[planned.arm.key][planned.seed], losses)
    return {"arm": planned.arm.key, "seed": planned.seed, **asdict(advice)}


def _outputs(planned: PlannedRun, evaluator: RunEvaluator) -> RunOutputs:
    return RunOutputs(planned.lora, evaluator.pictures(planned.lora, evaluator.prompts.seeds[0]))


def _groups(main: Sequence[PlannedRun], evaluator: RunEvaluator) -> dict[str, Any]:
    """The held-out loss by concept group: of the base, and of each arm and seed."""
    groups: dict[str, Any] = {group: {"base": loss, "values": {}} for group, loss in evaluator.groups(None).items()}
    for planned in main:
        for group, loss in evaluator.groups(planned.lora).items():
            groups[group]["values"].setdefault(planned.arm.key, {})[str(planned.seed)] = loss
    return groups


def _pictures(runs: Sequence[PlannedRun], evaluator: RunEvaluator) -> dict[str, Any]:
    """The pictures of the base and of each run, all of the first seed, as names below the report's folder."""
    seed = evaluator.prompts.seeds[0]
    files = [evaluator.pictures(None, seed), *(evaluator.pictures(planned.lora, seed) for planned in runs)]
    return {
        "prompts": list(evaluator.prompts.style),
        "columns": ["Base", *(planned.arm.name for planned in runs)],
        "files": [["/".join(file.parts[-3:]) for file in column] for column in files],
    }


def _save_grid(out: Path, result: ComparisonResult, captions: set[str]) -> None:
    pictures, steps = result["pictures"], result["settings"]["max_train_steps"]
    rows = [[Image.open(out / file).convert("RGB") for file in column] for column in pictures["files"]]
    caption = f"same prompts, seeds and settings; {steps} steps"
    if not captions.intersection(pictures["prompts"]):
        caption += "; none of these was trained on"
    grid = labelled_grid(rows, pictures["columns"], pictures["prompts"], caption=caption)
    grid.save(out / "compare.png")


def _values_as_json(values: Values) -> dict[str, dict[str, MetricValues]]:
    return {arm: {str(seed): of_run for seed, of_run in by_seed.items()} for arm, by_seed in values.items()}


def _trajectories_as_json(trajectories: Trajectories) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return {
        arm: {str(seed): [asdict(point) for point in points] for seed, points in by_seed.items()}
        for arm, by_seed in trajectories.items()
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} thread(s)"
