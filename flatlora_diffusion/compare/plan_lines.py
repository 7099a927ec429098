"""What a comparison will do and take, told before it begins: its trainings, the disk, the time."""

from __future__ import annotations

from collections.abc import Iterator

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.evaluator import HELDOUT
from flatlora_diffusion.compare.experiment import Experiment
from flatlora_diffusion.compare.inputs import free_device
from flatlora_diffusion.compare.page.page import GRID, PAGE
from flatlora_diffusion.compare.timing import in_words, seconds_per_pass, step_seconds, training_seconds
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.memory.disk import PIXEL, class_images_need, disk_need
from flatlora_diffusion.memory.estimate import in_gib, resolution_of
from flatlora_diffusion.training.disk_space import free_bytes


def outlook(experiment: Experiment) -> Iterator[str]:
    """A line for each thing that will be done, then what all of it takes.

    Raises ConfigError when the disk has not the room.
    """
    material, out = experiment.material, experiment.out
    names = " and ".join(arm.name for arm in experiment.arms)
    prompts = _counted(len(material.prompts.style), "prompt")
    unseen = _counted(len(material.sets[HELDOUT].samples), "image")
    nulls = ", ".join(null.arm.name for null in experiment.pairs)
    yield material.summary
    yield f"1. train {names} on them, {_steps(experiment)}"
    yield f"2. draw {prompts} with the base and with each LoRA: {out / GRID}"
    yield f"3. measure them, also on {unseen} that none saw: {out / PAGE}"
    if nulls:
        yield f"4. for that page train and measure controls, which show chance alone: {nulls}"
    yield _trainings(experiment)
    yield _room(experiment)
    yield duration(experiment)


def duration(experiment: Experiment) -> str:
    """How long it takes, by the passes of the UNet that are left and the seconds that one takes here and now."""
    own = experiment.own
    if own.cluster is not None:
        return "How long the cluster takes its bar tells, once it has begun"
    evaluator, sdxl = experiment.evaluator([planned for planned in experiment.main if planned.is_finished])
    each = seconds_per_pass(sdxl, experiment.config.data.resolution or sdxl.resolution)
    drawing = sum(piece.passes for piece in experiment.to_draw(evaluator))
    pieces = [*experiment.to_measure(evaluator), *experiment.to_measure_nulls(evaluator)]
    until_grid = training_seconds(experiment.main, experiment.runs, each) + drawing * each
    after = training_seconds(experiment.nulls, experiment.runs, each)
    after += (sum(piece.passes for piece in pieces) - drawing) * each
    del evaluator, sdxl
    free_device()  # for the trainings
    if until_grid + after == 0:
        return "All of it is done already"
    pictures = f"; the pictures are there after {in_words(until_grid)}" if until_grid else ""
    at_once = f", and less with {own.workers} trainings at once" if own.trains_at_once else ""
    is_known = bool(step_seconds(experiment.runs))
    basis = "the steps of its runs that are there" if is_known else "a picture drawn now, a step as so many passes"
    return f"About {in_words(until_grid + after)} on this machine as it is now, by {basis}{at_once}{pictures}"


def disk_bytes(experiment: Experiment) -> int:
    """About what the runs and pictures that are not there yet will fill."""
    runs = experiment.runs
    total = sum(_run_bytes(planned) for planned in runs if not planned.is_finished)
    if any(not planned.is_finished for planned in runs):
        total += class_images_need(experiment.config)
    prompts = experiment.material.prompts
    drawn = (len(prompts.style) + len(prompts.unrelated)) * len(prompts.seeds) * (1 + len(runs))
    there = sum(1 for _ in (experiment.out / "pictures").rglob("*.png"))
    return total + int(max(0, drawn - there) * PIXEL * resolution_of(experiment.config) ** 2)


def _run_bytes(planned: PlannedRun) -> int:
    """Of what is left of a run and of its folds, each of which keeps its best checkpoint and its last."""
    need, config = disk_need(planned.config), planned.config
    there = len(planned.run.checkpoints()) if planned.is_begun else 0
    points = max(0, planned.steps // config.run.checkpointing_steps - there)
    folds = config.data.holdout_folds * (need.result + 2 * need.checkpoint)
    trainings = config.average.trainings
    average = need.result * trainings if trainings > 1 else 0  # its rank is the sum of theirs
    return trainings * (need.result + points * need.checkpoint) + average + folds


def _room(experiment: Experiment) -> str:
    """The room that is needed and that is free. Raises ConfigError when that is less."""
    out, free = experiment.out, free_bytes(experiment.out)
    try:
        size = disk_bytes(experiment)
    except Exception as error:  # of a base that is no SDXL, which says so itself when it is loaded
        return f"The disk that it takes could not be estimated: {error}"
    if size > free:
        raise ConfigError(
            f"output_dir={str(out)!r} is on a disk with {in_gib(free)} free, but about {in_gib(size)} are needed for "
            f"{len(experiment.runs)} trainings and their pictures; make room, or give a folder on another disk, or a "
            "lower --num_seeds or --num_checkpoints"
        )
    return f"About {in_gib(size)} on disk in {out}, where {in_gib(free)} are free"


def _trainings(experiment: Experiment) -> str:
    """How many there are, and how many of them are done."""
    done = sum(planned.config.average.trainings for planned in experiment.runs if planned.is_finished)
    count = sum(planned.config.average.trainings for planned in experiment.runs)
    folds = experiment.config.data.holdout_folds
    before = f", each after one for each of {folds} folds" if folds else ""
    return f"{_counted(count, 'training')} in all{before}" + (f"; {done} are done" if done else "")


def _steps(experiment: Experiment) -> str:
    steps = sorted({planned.steps for planned in experiment.main})
    each = f"{steps[0]} steps each" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps each"
    seeds = experiment.own.num_seeds
    return each + (f", {seeds} seeds" if seeds > 1 else "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
