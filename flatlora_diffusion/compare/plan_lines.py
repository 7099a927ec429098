"""The log lines before a comparison begins: its phases, trainings, disk space and expected duration."""

from __future__ import annotations

from collections.abc import Iterator

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.evaluator import HELDOUT
from flatlora_diffusion.compare.experiment import Experiment
from flatlora_diffusion.compare.inputs import free_gpu_memory
from flatlora_diffusion.compare.page.page import GRID, PAGE
from flatlora_diffusion.compare.timing import duration_text, seconds_per_pass, step_seconds, training_seconds
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.memory.disk import PIXEL, class_images_need, run_bytes
from flatlora_diffusion.memory.estimate import in_gib, resolution_of
from flatlora_diffusion.storage.formatting import count_text
from flatlora_diffusion.training.disk_space import free_bytes


def plan_lines(experiment: Experiment) -> Iterator[str]:
    """Yield a line for each phase, then lines for trainings, disk space and duration.

    Raises ConfigError if there is not enough disk space.
    """
    inputs, out = experiment.inputs, experiment.out
    names = " and ".join(arm.name for arm in experiment.arms)
    prompts = count_text(len(inputs.prompts.style), "prompt")
    heldout = count_text(len(inputs.sets[HELDOUT].samples), "held-out image")
    controls = ", ".join(control.arm.name for control in experiment.controls)
    yield inputs.summary
    yield f"1. train {names} on them, {_steps(experiment)}"
    yield f"2. draw {prompts} with the base and with each LoRA: {out / GRID}"
    yield f"3. measure losses, also on {heldout}, and pictures: {out / PAGE}"
    if controls:
        yield f"4. train and measure controls for the same page, which show the effect of chance: {controls}"
    yield _trainings_line(experiment)
    yield _disk_line(experiment)
    yield expected_duration(experiment)
    if experiment.forecast is not None:
        yield from experiment.forecast.lines()


def expected_duration(experiment: Experiment) -> str:
    """Describe the expected duration."""
    options = experiment.options
    if options.cluster is not None:
        return "The progress bar will show how long the cluster takes"
    until_grid, after = expected_seconds(experiment)
    if until_grid + after == 0:
        return "Everything is done already"
    pictures = f"; the pictures are ready after {duration_text(until_grid)}" if until_grid else ""
    parallel = f", less with {options.workers} trainings in parallel" if options.trains_at_once else ""
    basis = "the steps of its earlier runs" if step_seconds(experiment.runs) else "the time to draw a picture"
    return f"About {duration_text(until_grid + after)} on this machine, estimated from {basis}{parallel}{pictures}"


def expected_seconds(experiment: Experiment) -> tuple[float, float]:
    """Estimate the seconds until the pictures are drawn, and the seconds after that.

    Loads the base to time a pass through the denoiser on this machine, which is multiplied by the remaining passes.
    """
    evaluator, base = experiment.evaluator([planned for planned in experiment.arm_runs if planned.is_finished])
    pass_seconds = seconds_per_pass(base, experiment.config.data.resolution or base.resolution)
    if experiment.forecast is not None:
        experiment.forecast.pass_seconds = pass_seconds
    drawing = sum(item.passes for item in experiment.drawing_items(evaluator))
    items = [*experiment.measurement_items(evaluator), *experiment.control_items(evaluator)]
    until_grid = training_seconds(experiment.arm_runs, experiment.runs, pass_seconds) + drawing * pass_seconds
    after = training_seconds(experiment.control_runs, experiment.runs, pass_seconds)
    after += (sum(item.passes for item in items) - drawing) * pass_seconds
    del evaluator, base
    free_gpu_memory()  # for the trainings
    return until_grid, after


def disk_bytes(experiment: Experiment) -> int:
    """Estimate the bytes of the runs and pictures that do not exist yet."""
    runs = experiment.runs
    total = sum(remaining_bytes(planned) for planned in runs if not planned.is_finished)
    if any(not planned.is_finished for planned in runs):
        total += class_images_need(experiment.config)
    prompts = experiment.inputs.prompts
    pictures = (len(prompts.style) + len(prompts.unrelated)) * len(prompts.seeds) * (1 + len(runs))
    existing = sum(1 for _ in (experiment.out / "pictures").rglob("*.png"))
    return total + int(max(0, pictures - existing) * PIXEL * resolution_of(experiment.config) ** 2)


def remaining_bytes(planned: PlannedRun) -> int:
    """The bytes of the rest of a run."""
    existing = len(planned.run.checkpoints()) if planned.is_resumable else 0
    return run_bytes(planned.config, max(0, planned.steps // planned.config.run.checkpointing_steps - existing))


def _disk_line(experiment: Experiment) -> str:
    """The disk space needed and free. Raises ConfigError if too little is free."""
    out, free = experiment.out, free_bytes(experiment.out)
    try:
        size = disk_bytes(experiment)
    except Exception as error:  # the base is not SDXL, which loading it will report
        return f"The disk space could not be estimated: {error}"
    if size > free:
        raise ConfigError(
            f"output_dir={str(out)!r} is on a disk with {in_gib(free)} free, but about {in_gib(size)} are needed for "
            f"{len(experiment.runs)} trainings and their pictures; free some space, give a folder on another disk, or "
            "lower --num_seeds or --num_checkpoints"
        )
    return f"About {in_gib(size)} on disk in {out}, where {in_gib(free)} are free"


def _trainings_line(experiment: Experiment) -> str:
    done = sum(planned.config.average.trainings for planned in experiment.runs if planned.is_finished)
    count = sum(planned.config.average.trainings for planned in experiment.runs)
    return f"{count_text(count, 'training')} in all" + (f"; {done} are done" if done else "")


def _steps(experiment: Experiment) -> str:
    steps = sorted({planned.steps for planned in experiment.arm_runs})
    text = f"{steps[0]} steps each" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps each"
    seeds = experiment.options.num_seeds
    return text + (f", {seeds} seeds" if seeds > 1 else "")
