"""`compare`: trains arms as one experiment, measures them alike and writes a report.

ARM/seed-N/           the run folders
pictures/, measured/  cached pictures and losses
timing.jsonl          the seconds of each drawing and measurement, written by `evidence`
compare.png           training images, pictures of the base and of each arm, real images; written before measuring
compare.html          verdict, pictures, figures with intervals, proof; one file that works offline
compare.json          every figure and hash
compare.md            the table of means

The report is written when the arms are measured, and again with the controls. The same command resumes after a stop.
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
from flatlora_diffusion.compare.by_image import by_image
from flatlora_diffusion.compare.controls import RunOutputs, control_rows
from flatlora_diffusion.compare.evaluator import OWN_METRICS, TRAIN, MetricValues, RunEvaluator
from flatlora_diffusion.compare.experiment import Experiment, read_experiment
from flatlora_diffusion.compare.fairness_checks import shared_conditions
from flatlora_diffusion.compare.findings import Trajectories, metrics_table, paired_rows, verdict
from flatlora_diffusion.compare.forecast import Forecast
from flatlora_diffusion.compare.inputs import free_gpu_memory
from flatlora_diffusion.compare.page.page import GRID, PAGE, RESULT, write_compare_page
from flatlora_diffusion.compare.picture_grid import comparison_grid
from flatlora_diffusion.compare.plan_lines import plan_lines
from flatlora_diffusion.compare.trajectory import TrajectoryPoint, advise
from flatlora_diffusion.config import CompareConfig, TrainConfig
from flatlora_diffusion.evaluation.metrics import describe_metrics
from flatlora_diffusion.signals import describe_interruption
from flatlora_diffusion.storage.atomic_io import atomic_write, write_text
from flatlora_diffusion.storage.run_lock import lock_folder
from flatlora_diffusion.storage.saved_config import portable
from flatlora_diffusion.storage.versions import versions

logger = logging.getLogger(__name__)


class ComparisonResult(TypedDict):
    """The contents of compare.json, with arms by their keys; in the file, seeds and strengths are text."""

    settings: dict[str, Any]
    arms: list[dict[str, Any]]
    seeds: list[int]
    metrics: list[dict[str, Any]]
    base: MetricValues
    values: dict[str, dict[int, MetricValues]]
    image_losses: dict[str, dict[int, dict[str, list[float]]]]
    trajectories: dict[str, dict[int, list[dict[str, Any]]]]
    groups: dict[str, Any]
    by_image: dict[str, Any]
    paired: list[dict[str, Any]]
    verdict: str
    proof: list[dict[str, Any]]
    nulls: list[dict[str, Any]]
    advice: list[dict[str, Any]]
    pictures: dict[str, Any]
    strengths: dict[str, dict[str, MetricValues]]
    device: str
    versions: dict[str, str]


def compare(config: TrainConfig, options: CompareConfig, forecast: Forecast | None = None) -> Path:
    """Train all arms and controls below `output_dir`, measure them and write the report; return the folder.

    Logs a plan with the expected duration first. Finished runs with the same settings are reused.

    Args:
        forecast: Logs the expected time of this comparison and of later ones as their speeds are measured.

    Raises:
        ConfigError: The input is wrong, the runs are not comparable, or there is not enough disk space.
        RunError: A training fails.
    """
    with lock_folder(Path(config.run.output_dir), "output_dir"):
        experiment = read_experiment(config, options, forecast)
        for line in plan_lines(experiment):
            logger.info("%s", line)
        return _compare(experiment)


def _compare(experiment: Experiment) -> Path:
    """Run the phases; pictures come before the long measurements."""
    out = experiment.out
    with describe_interruption(lambda: f"with everything so far saved in {out}: repeat the command to resume"):
        experiment.train(experiment.arm_runs)
        result = _evaluate_arms(experiment)
        if experiment.control_runs:
            free_gpu_memory()  # for the trainings to come
            experiment.train(experiment.control_runs)
            _evaluate_controls(experiment, result)
    return out


def _evaluate_arms(experiment: Experiment) -> ComparisonResult:
    out = experiment.out
    evaluator, base = experiment.evaluator(experiment.arm_runs)
    logger.info("Drawing the same prompts with the base and each LoRA")
    experiment.run_items(base.denoiser, experiment.drawing_items(evaluator))
    pictures = _pictures(experiment.first_runs, evaluator)
    captions = {sample.caption for sample in experiment.inputs.sets[TRAIN].samples}
    grid = comparison_grid(experiment.first_runs, evaluator, captions)
    with atomic_write(out / GRID) as temporary:
        grid.save(temporary, format="PNG")
    logger.info("Look at %s", out / GRID)
    logger.info("Measuring the base and each LoRA")
    experiment.run_items(base.denoiser, experiment.measurement_items(evaluator))
    result = _measure(experiment, evaluator, pictures)
    _write(out, result)
    logger.info("Look at %s%s", out / PAGE, ", still without the controls" if experiment.control_runs else "")
    return result


def _evaluate_controls(experiment: Experiment, result: ComparisonResult) -> None:
    evaluator, base = experiment.evaluator(experiment.runs)
    logger.info("Measuring the controls")
    experiment.run_items(base.denoiser, experiment.control_items(evaluator))
    values = dict(result["values"])
    for planned in experiment.control_runs:
        values[planned.arm.key] = {planned.seed: evaluator.losses(planned.lora)}
    runs = [*experiment.first_runs, *experiment.control_runs]
    outputs = {run.arm.key: RunOutputs(run.lora, evaluator.pictures(run.lora)) for run in runs}
    complete: ComparisonResult = {
        **result,
        "arms": [*result["arms"], *(asdict(planned.arm) for planned in experiment.control_runs)],
        "values": values,
        "proof": shared_conditions(experiment.runs),
        "nulls": control_rows(experiment.arms, experiment.controls, outputs, values, experiment.arm_runs[0].seed),
    }
    _write(experiment.out, complete)


def _write(out: Path, result: ComparisonResult) -> None:
    text = json.dumps(result, indent=1)
    write_text(out / RESULT, text + "\n")
    names = {arm["key"]: arm["name"] for arm in result["arms"] if arm["role"] == "arm"}
    table = metrics_table(names, result["metrics"], result["base"], result["values"])
    write_text(out / "compare.md", table + "\n")
    write_compare_page(json.loads(text), out)


def _settings(experiment: Experiment, guidance: float) -> dict[str, Any]:
    """The settings of the runs and of the comparison, and the size and hash of each image set."""
    precision = experiment.arm_runs[0].run.config()["mixed_precision"]
    options = {
        name: Path(value).name if name.endswith(("_dir", "_file")) and value else value
        for name, value in asdict(experiment.options).items()
        if name not in ("workers", "cluster")  # these do not affect the result
    }
    sets = {
        f"{name} images": f"{len(images.samples)}, {images.sha256[:16]}"
        for name, images in experiment.inputs.sets.items()
    }
    options["guidance_scale"] = guidance
    return {**portable(experiment.config.to_dict()), "mixed_precision": precision, **options, **sets}


def _measure(experiment: Experiment, evaluator: RunEvaluator, pictures: dict[str, Any]) -> ComparisonResult:
    arms, runs, first_runs = experiment.arms, experiment.arm_runs, experiment.first_runs
    values: dict[str, dict[int, MetricValues]] = {}
    images: dict[str, dict[int, dict[str, list[float]]]] = {}
    trajectories: dict[str, dict[int, list[TrajectoryPoint]]] = {}
    base = evaluator.base_metrics()
    for planned in runs:
        values.setdefault(planned.arm.key, {})[planned.seed] = evaluator.run_metrics(planned)
        images.setdefault(planned.arm.key, {})[planned.seed] = evaluator.image_losses(planned.lora)
        trajectories.setdefault(planned.arm.key, {})[planned.seed] = evaluator.trajectory(planned)
    metrics = _metrics([base, *(of_run for by_seed in values.values() for of_run in by_seed.values())])
    differences = paired_rows(arms, [metric["key"] for metric in metrics], values, images, trajectories)
    strengths = {planned.arm.key: evaluator.strengths(planned) for planned in first_runs}
    return ComparisonResult(
        settings=_settings(experiment, evaluator.prompts.guidance),
        arms=[asdict(arm) for arm in arms],
        seeds=list(dict.fromkeys(planned.seed for planned in runs)),
        metrics=metrics,
        base=base,
        values=values,
        image_losses=images,
        trajectories={
            arm: {seed: [asdict(point) for point in points] for seed, points in by_seed.items()}
            for arm, by_seed in trajectories.items()
        },
        groups=_groups(runs, evaluator),
        by_image=by_image(runs, experiment.inputs.sets[TRAIN].samples, evaluator.training, experiment.out),
        paired=differences,
        verdict=verdict(differences, {arm.key: arm.name for arm in arms}),
        proof=shared_conditions(runs),
        nulls=[],
        advice=[_advice(planned, trajectories, strengths) for planned in first_runs],
        pictures=pictures,
        strengths={arm: {f"{at:g}": losses for at, losses in by_at.items()} for arm, by_at in strengths.items()},
        device=_device(),
        versions={"python": platform.python_version(), **versions()},
    )


def _metrics(values: Sequence[MetricValues]) -> list[dict[str, Any]]:
    """Name, direction and digits of each measured key, those of `OWN_METRICS` first."""
    keys = dict.fromkeys(key for of_run in values for key in of_run)
    own_metrics = [dict(metric._asdict()) for metric in OWN_METRICS if metric.key in keys]
    return own_metrics + describe_metrics([key for key in keys if key not in {metric.key for metric in OWN_METRICS}])


def _advice(
    planned: PlannedRun, trajectories: Trajectories, strengths: Mapping[str, Mapping[float, MetricValues]]
) -> dict[str, Any]:
    losses = {strength: values["heldout_loss"] for strength, values in strengths[planned.arm.key].items()}
    advice = advise(trajectories[planned.arm.key][planned.seed], losses)
    return {"arm": planned.arm.key, "seed": planned.seed, **asdict(advice)}


def _groups(runs: Sequence[PlannedRun], evaluator: RunEvaluator) -> dict[str, Any]:
    """The held-out loss by concept group, of the base and of each arm and seed."""
    groups: dict[str, Any] = {group: {"base": loss, "values": {}} for group, loss in evaluator.groups(None).items()}
    for planned in runs:
        for group, loss in evaluator.groups(planned.lora).items():
            groups[group]["values"].setdefault(planned.arm.key, {})[planned.seed] = loss
    return groups


def _pictures(runs: Sequence[PlannedRun], evaluator: RunEvaluator) -> dict[str, Any]:
    """The pictures of the base and of each run with the first seed, as paths below the report's folder."""
    files = [evaluator.pictures(None), *(evaluator.pictures(planned.lora) for planned in runs)]
    return {
        "prompts": list(evaluator.prompts.style),
        "guidance": evaluator.prompts.guidance,
        "columns": ["Base", *(planned.arm.name for planned in runs)],
        "files": [["/".join(file.parts[-3:]) for file in column] for column in files],
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} thread(s)"
