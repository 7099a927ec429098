"""What is compared, and with what: the arms and nulls, planned and trained; what that will take, told before."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flatlora_diffusion.compare.arms import Arm, PlannedRun, null_arms, parse_arm, plan, train_planned
from flatlora_diffusion.compare.evaluator import BASE, HELDOUT, RunEvaluator
from flatlora_diffusion.compare.material import Material, load_evaluator, read_material
from flatlora_diffusion.compare.page.page import GRID, PAGE
from flatlora_diffusion.compare.poster import poster_pieces
from flatlora_diffusion.compare.progress import Piece
from flatlora_diffusion.compare.workers.at_once import train_at_once
from flatlora_diffusion.compare.workers.places import check_places
from flatlora_diffusion.config import CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.data.training_set import load_training_set
from flatlora_diffusion.evaluation.finished_runs import check_images, read_runs
from flatlora_diffusion.ground.provenance import base_fingerprint
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.sdxl.sampling import generate_images

# A step of training costs as much as drawing does for so many passes of each of its samples through the UNet: steps of
# `benchmarks/train_step.py` against the picture that is timed here, both on 2 CPU cores; a rival's from its passes.
# Flat-LoRA's are 1.0 times LoRA's with attention layers alone, and 1.2 times with the tiny base's convolutions too.
PASSES = {
    "lora": 2.5,
    "flat-lora": 2.75,
    "mixed-noise": 5.25,
    "factor-noise": 2.5,
    "lora-sam": 5.0,
    "sam": 6.0,
    "bi-lora": 3.0,
    "nbar": 2.5,
    "obar": 2.5,
}
_START_SECONDS = 10  # in which the process of a training imports its libraries and loads the base


@dataclass(frozen=True)
class Experiment:
    """The runs that are compared, and what they are measured with."""

    config: TrainConfig
    own: CompareConfig
    material: Material
    arms: Sequence[Arm]
    main: Sequence[PlannedRun]
    nulls: Sequence[PlannedRun]

    @property
    def out(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def runs(self) -> list[PlannedRun]:
        return [*self.main, *self.nulls]

    @property
    def first(self) -> list[PlannedRun]:
        """The run of each arm whose pictures are shown."""
        return [planned for planned in self.main if planned.seed == self.main[0].seed]

    def train(self, runs: Sequence[PlannedRun]) -> None:
        """Train what is not trained yet; raises ConfigError for runs that do not fit together."""
        if self.own.trains_at_once:
            train_at_once(runs, self.own.workers, self.own.cluster)
        else:
            for planned in runs:
                train_planned(planned)
        found = read_runs([str(planned.run.folder) for planned in self.runs if planned.is_finished])
        check_images(found[0], load_training_set(self.config.data))

    def evaluator(self, trained: Sequence[PlannedRun]) -> tuple[RunEvaluator, Sdxl]:
        """The evaluator of all runs with its base, which must be that of the `trained` ones."""
        config = self.config
        if trained:
            config = config.replace(mixed_precision=trained[0].run.config()["mixed_precision"])  # as accelerate chose
        evaluator, sdxl = load_evaluator(config, self.runs, self.material)
        _check_base(config, sdxl, trained)
        return evaluator, sdxl

    def to_draw(self, evaluator: RunEvaluator) -> list[Piece]:
        """What the grid needs."""
        models = [(BASE, None), *((planned.arm.name, planned.lora) for planned in self.first)]
        pieces = [evaluator.to_draw(name, lora, evaluator.prompts.seeds[0]) for name, lora in models]
        return pieces + poster_pieces(self.first[0], evaluator)

    def to_measure(self, evaluator: RunEvaluator) -> list[Piece]:
        """What the report of the arms needs."""
        return [*evaluator.to_measure_base(), *(piece for run in self.main for piece in evaluator.to_measure(run))]

    def to_measure_nulls(self, evaluator: RunEvaluator) -> list[Piece]:
        """What the nulls add."""
        return [piece for planned in self.nulls for piece in evaluator.to_measure_null(planned)]


def read_experiment(config: TrainConfig, own: CompareConfig) -> Experiment:
    """The experiment that the settings describe. Raises ConfigError for settings and images that cannot be used."""
    check_places(own.workers, own.cluster)
    seed = config.run.seed
    assert seed is not None
    arms = [parse_arm(text) for text in own.arms]
    main = plan(config, arms, range(seed, seed + own.num_seeds), own.num_checkpoints)
    null = [*_missing(arms), *null_arms(seed, config.adapter.lora_init_seed)]
    material = read_material(config, own)  # takes longest
    return Experiment(config, own, material, arms, main, plan(config, null, [seed], own.num_checkpoints))


def outlook(experiment: Experiment) -> Iterator[str]:
    """What will be done, a line each, and on a CPU about how long it takes."""
    material, out, seeds = experiment.material, experiment.out, experiment.own.num_seeds
    names = " and ".join(arm.name for arm in experiment.arms)
    steps = f"{experiment.config.optim.max_train_steps} steps each" + f", {seeds} seeds" * (seeds > 1)
    prompts = _counted(len(material.prompts.style), "prompt")
    unseen = _counted(len(material.sets[HELDOUT].samples), "image")
    yield material.summary
    yield f"1. train {names} on them, {steps}"
    yield f"2. draw {prompts} with the base and with each LoRA: {out / GRID}"
    yield f"3. measure them, also on {unseen} that none saw: {out / PAGE}"
    yield f"4. train and measure {len(experiment.nulls)} nulls, which show what chance alone does, for that page"
    # The trainings shall have a GPU for themselves; how they share cores or a cluster cannot be told.
    if not (torch.cuda.is_available() or experiment.own.trains_at_once):
        yield duration(experiment)


def duration(experiment: Experiment) -> str:
    """How long it takes, by the passes of the UNet that are left and the seconds that one takes here and now."""
    evaluator, sdxl = experiment.evaluator([planned for planned in experiment.main if planned.is_finished])
    each = seconds_per_pass(sdxl, experiment.config.data.resolution or sdxl.resolution)
    drawing = sum(piece.passes for piece in experiment.to_draw(evaluator))
    until_grid = sum(_training_seconds(planned, each) for planned in experiment.main) + drawing * each
    after = sum(_training_seconds(planned, each) for planned in experiment.nulls)
    pieces = [*experiment.to_measure(evaluator), *experiment.to_measure_nulls(evaluator)]
    after += (sum(piece.passes for piece in pieces) - drawing) * each
    if until_grid + after == 0:
        return "All of it is done already"
    pictures = f"; the pictures are there after {_in_words(until_grid)}" if until_grid else ""
    return f"About {_in_words(until_grid + after)} on this machine as it is now{pictures}"


def _training_seconds(planned: PlannedRun, each: float) -> float:
    """How long what is left of a training takes, `each` pass so many seconds."""
    if planned.is_finished:
        return 0
    optim, runs = planned.config.optim, 1 + planned.config.data.holdout_folds
    samples = runs * planned.steps_left * optim.train_batch_size * optim.gradient_accumulation_steps
    return _START_SECONDS + samples * PASSES[planned.arm.method] * each


def seconds_per_pass(sdxl: Sdxl, resolution: int) -> float:
    """How long one sample takes through the UNet while a picture is drawn; a slow one is timed for one step alone."""
    seconds = 0.0
    for steps in (1, 5):
        if seconds < 1:
            began = time.perf_counter()
            generate_images(sdxl, ["an icon"], [0], resolution, steps, batch_size=1)
            seconds = (time.perf_counter() - began) / (2 * steps)
    return seconds


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return "a minute"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


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
