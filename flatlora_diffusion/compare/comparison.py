"""`compare`: arms trained as one experiment, measured alike, and the report of it.

ARM/seed-N/     the run folders;  pictures/, measured/: what is not drawn or measured twice
compare.png     what was trained on, the same prompts and seeds by the base and each arm, and the real images of them,
                before anything is measured
compare.html    the verdict, pictures, numbers with intervals, proof: one file that needs no network
compare.json    every figure and hash
compare.md      the table

The report is written when the arms are measured, and again with the nulls. After a stop the same command goes on.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import torch

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.controls import RunOutputs, null_rows
from flatlora_diffusion.compare.early_stopping import advise
from flatlora_diffusion.compare.evaluator import OWN_METRICS, TRAIN, MetricValues, RunEvaluator
from flatlora_diffusion.compare.experiment import Experiment, read_experiment
from flatlora_diffusion.compare.fairness_checks import shared_conditions
from flatlora_diffusion.compare.findings import Trajectories, Values, metrics_table, paired_rows, verdict
from flatlora_diffusion.compare.inputs import free_device
from flatlora_diffusion.compare.page.page import GRID, PAGE, RESULT, write_compare_page
from flatlora_diffusion.compare.picture_grid import poster
from flatlora_diffusion.compare.plan_lines import outlook
from flatlora_diffusion.compare.progress import do_pieces
from flatlora_diffusion.compare.trajectory import TrajectoryPoint
from flatlora_diffusion.config import CompareConfig, TrainConfig
from flatlora_diffusion.evaluation.metrics import described
from flatlora_diffusion.signals import describe_interruption
from flatlora_diffusion.storage.atomic_io import write_text, writing_whole
from flatlora_diffusion.storage.run_lock import alone_in
from flatlora_diffusion.storage.saved_config import portable
from flatlora_diffusion.storage.versions import versions

logger = logging.getLogger(__name__)


class ComparisonResult(TypedDict):
    """The contents of compare.json, in JSON's own types: arms by their keys, seeds and strengths as text."""

    settings: dict[str, Any]
    arms: list[dict[str, Any]]
    seeds: list[int]
    metrics: list[dict[str, Any]]
    base: MetricValues
    values: dict[str, dict[str, MetricValues]]
    image_losses: dict[str, dict[str, dict[str, list[float]]]]
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

    What that takes is told before. Finished runs with the same settings are not trained again. Raises ConfigError for
    wrong input, for runs that cannot be compared and for a disk without room, RunError when one could not be trained.
    """
    with alone_in(Path(config.run.output_dir), "output_dir"):
        experiment = read_experiment(config, own)
        for line in outlook(experiment):
            logger.info("%s", line)
        return _compare(experiment)


def _compare(experiment: Experiment) -> Path:
    """The phases in their order: what there is to look at comes before what takes long."""
    out = experiment.out
    with describe_interruption(lambda: f"with what is done kept in {out}: the same command goes on from there"):
        experiment.train(experiment.main)
        result = _evaluate_arms(experiment)
        if experiment.nulls:
            free_device()  # for the trainings to come
            experiment.train(experiment.nulls)
            _evaluate_nulls(experiment, result)
    return out


def _evaluate_arms(experiment: Experiment) -> ComparisonResult:
    """Draw the grid, measure the arms and write the report without nulls; returns what was found."""
    out = experiment.out
    evaluator, sdxl = experiment.evaluator(experiment.main)
    logger.info("Drawing the same prompts with the base and each LoRA")
    do_pieces(sdxl.unet, experiment.to_draw(evaluator))
    pictures = _pictures(experiment.first, evaluator)
    captions = {sample.caption for sample in experiment.material.sets[TRAIN].samples}
    grid = poster(experiment.first, evaluator, captions)
    with writing_whole(out / GRID) as aside:  # it is looked at while the rest goes on
        grid.save(aside, format="PNG")
    logger.info("Look at %s", out / GRID)
    logger.info("Measuring the base and each LoRA")
    do_pieces(sdxl.unet, experiment.to_measure(evaluator))
    result = _measure(experiment, evaluator, pictures)
    _write(out, result)
    logger.info("Look at %s%s", out / PAGE, ": all but the controls is there" if experiment.nulls else "")
    return result


def _evaluate_nulls(experiment: Experiment, result: ComparisonResult) -> None:
    """Measure the nulls and write the whole report."""
    evaluator, sdxl = experiment.evaluator(experiment.runs)
    logger.info("Measuring the controls")
    do_pieces(sdxl.unet, experiment.to_measure_nulls(evaluator))
    values = {
        arm: {int(seed): of_run for seed, of_run in by_seed.items()} for arm, by_seed in result["values"].items()
    }
    for planned in experiment.nulls:
        values[planned.arm.key] = {planned.seed: evaluator.losses(planned)}
    outputs = {planned.arm.key: _outputs(planned, evaluator) for planned in (*experiment.first, *experiment.nulls)}
    with_nulls: ComparisonResult = {
        **result,
        "arms": [*result["arms"], *(asdict(planned.arm) for planned in experiment.nulls)],
        "values": _values_as_json(values),
        "proof": shared_conditions(experiment.runs),
        "nulls": null_rows(experiment.arms, experiment.pairs, outputs, values, experiment.main[0].seed),
    }
    _write(experiment.out, with_nulls)


def _write(out: Path, result: ComparisonResult) -> None:
    """Write the report of `result`."""
    write_text(out / RESULT, json.dumps(result, indent=1) + "\n")
    names = {arm["key"]: arm["name"] for arm in result["arms"] if arm["role"] == "arm"}
    table = metrics_table(names, result["metrics"], result["base"], result["values"])
    write_text(out / "compare.md", table + "\n")
    write_compare_page(result, out)


def _settings(experiment: Experiment) -> dict[str, Any]:
    """The settings of the arms and of the comparison itself, and the image sets by their hashes."""
    precision = experiment.main[0].run.config()["mixed_precision"]
    mine = {
        name: Path(value).name if name.endswith(("_dir", "_file")) and value else value
        for name, value in asdict(experiment.own).items()
        if name not in ("workers", "cluster")  # where it was trained changes nothing of it
    }
    sets = {
        f"{name} images": f"{len(one.samples)}, {one.sha256[:16]}" for name, one in experiment.material.sets.items()
    }
    return {**portable(experiment.config.to_dict()), "mixed_precision": precision, **mine, **sets}


def _measure(experiment: Experiment, evaluator: RunEvaluator, pictures: dict[str, Any]) -> ComparisonResult:
    """Every value of the arms, and what follows from them."""
    arms, main, first = experiment.arms, experiment.main, experiment.first
    values: dict[str, dict[int, MetricValues]] = {}
    images: dict[str, dict[int, dict[str, list[float]]]] = {}
    trajectories: dict[str, dict[int, list[TrajectoryPoint]]] = {}
    base = evaluator.base()
    for planned in main:
        values.setdefault(planned.arm.key, {})[planned.seed] = evaluator.run(planned)
        images.setdefault(planned.arm.key, {})[planned.seed] = evaluator.image_losses(planned.lora)
        trajectories.setdefault(planned.arm.key, {})[planned.seed] = evaluator.trajectory(planned)
    metrics = _metrics([base, *(of_run for by_seed in values.values() for of_run in by_seed.values())])
    differences = paired_rows(arms, [metric["key"] for metric in metrics], values, images, trajectories)
    strengths = {planned.arm.key: evaluator.strengths(planned) for planned in first}
    return ComparisonResult(
        settings=_settings(experiment),
        arms=[asdict(arm) for arm in arms],
        seeds=list(dict.fromkeys(planned.seed for planned in main)),
        metrics=metrics,
        base=base,
        values=_values_as_json(values),
        image_losses={arm: {str(seed): of_run for seed, of_run in by_seed.items()} for arm, by_seed in images.items()},
        trajectories=_trajectories_as_json(trajectories),
        groups=_groups(main, evaluator),
        paired=differences,
        verdict=verdict(differences, {arm.key: arm.name for arm in arms}),
        proof=shared_conditions(main),
        nulls=[],
        advice=[_advice(planned, trajectories, strengths) for planned in first],
        pictures=pictures,
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
        "guidance": evaluator.prompts.guidance,
        "columns": ["Base", *(planned.arm.name for planned in runs)],
        "files": [["/".join(file.parts[-3:]) for file in column] for column in files],
    }


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
