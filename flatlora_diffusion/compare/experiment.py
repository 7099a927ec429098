"""An experiment: its arms and controls, planned and trained, and the inputs they are measured with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from flatlora_diffusion.compare.arms import Arm, PlannedRun, parse_arm, plan_runs, train_run
from flatlora_diffusion.compare.controls import Control, make_controls
from flatlora_diffusion.compare.evaluator import BASE, RunEvaluator
from flatlora_diffusion.compare.forecast import Forecast
from flatlora_diffusion.compare.inputs import Inputs, load_evaluator, read_inputs
from flatlora_diffusion.compare.members import copy_shared_members
from flatlora_diffusion.compare.parallel import train_in_parallel
from flatlora_diffusion.compare.picture_grid import grid_items
from flatlora_diffusion.compare.progress import WorkItem, run_items
from flatlora_diffusion.compare.timing import duration_text, training_seconds
from flatlora_diffusion.compare.worker_slots import check_workers
from flatlora_diffusion.config import CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.data.sources import load_training_set
from flatlora_diffusion.evaluation.finished_runs import check_images, read_runs
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.storage.hashing import base_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """The runs of a comparison and its inputs.

    Attributes:
        arm_runs: The runs of the arms, seed by seed.
        control_runs: The runs of the controls, of the first seed.
        forecast: Logs the expected time while the runs are trained and measured.
    """

    config: TrainConfig
    options: CompareConfig
    inputs: Inputs
    arms: Sequence[Arm]
    arm_runs: Sequence[PlannedRun]
    controls: Sequence[Control]
    control_runs: Sequence[PlannedRun]
    forecast: Forecast | None = None

    @property
    def out(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def runs(self) -> list[PlannedRun]:
        return [*self.arm_runs, *self.control_runs]

    @property
    def first_runs(self) -> list[PlannedRun]:
        """The run of each arm with the first seed, whose pictures are shown."""
        return [planned for planned in self.arm_runs if planned.seed == self.arm_runs[0].seed]

    def train(self, runs: Sequence[PlannedRun]) -> None:
        """Train the unfinished `runs`. Raises ConfigError if the finished runs are not comparable."""
        if self.options.trains_at_once:
            train_in_parallel(runs, self.options.workers, self.options.cluster)
        else:
            for planned in runs:
                is_new = not planned.is_finished
                copy_shared_members(planned, self.runs)
                train_run(planned, None if self.forecast is None else self.forecast.watch)
                if is_new:
                    self._log_remaining_time()
        finished = read_runs([str(planned.run.folder) for planned in self.runs if planned.is_finished])
        check_images(finished[0], load_training_set(self.config.data))

    def run_items(self, denoiser: nn.Module, items: Sequence[WorkItem]) -> None:
        """Draw and measure `items`."""
        if self.forecast is None:
            run_items(denoiser, items)
        else:
            run_items(denoiser, items, self.forecast.item_done)
            self.forecast.log()

    def _log_remaining_time(self) -> None:
        if self.forecast is not None:
            self.forecast.log()
            return
        pending = [planned for planned in self.runs if not planned.is_finished]
        if pending:
            duration = duration_text(training_seconds(pending, self.runs, 0.0))
            done = len(self.runs) - len(pending)
            logger.info("%d of %d trainings done; about %s left to train", done, len(self.runs), duration)

    def evaluator(self, trained: Sequence[PlannedRun]) -> tuple[RunEvaluator, Base]:
        """Load the evaluator of all runs and its base, which must be the base of the `trained` runs."""
        config = self.config
        if trained:
            config = config.replace(mixed_precision=trained[0].run.config()["mixed_precision"])  # chosen by accelerate
        evaluator, base = load_evaluator(config, self.runs, self.inputs)
        _check_same_base(config, base, trained)
        if self.forecast is not None:
            self.forecast.count(evaluator)
        return evaluator, base

    def drawing_items(self, evaluator: RunEvaluator) -> list[WorkItem]:
        """The drawings of the picture grid."""
        models = [(BASE, None), *((planned.arm.name, planned.lora) for planned in self.first_runs)]
        items = [evaluator.drawing_item(name, lora) for name, lora in models]
        return items + grid_items(self.first_runs[0], evaluator)

    def measurement_items(self, evaluator: RunEvaluator) -> list[WorkItem]:
        """The measurements of the base and of the arms."""
        return [*evaluator.base_items(), *(item for run in self.arm_runs for item in evaluator.measurement_items(run))]

    def control_items(self, evaluator: RunEvaluator) -> list[WorkItem]:
        """The measurements of the controls."""
        return [item for planned in self.control_runs for item in evaluator.control_items(planned)]


class Plan(NamedTuple):
    """The arms and controls of an experiment with their runs."""

    arms: Sequence[Arm]
    arm_runs: Sequence[PlannedRun]
    controls: Sequence[Control]
    control_runs: Sequence[PlannedRun]


def plan_experiment(config: TrainConfig, options: CompareConfig) -> Plan:
    """Plan the runs of the settings. Raises ConfigError for invalid settings."""
    seed = config.run.seed
    assert seed is not None
    arms = [parse_arm(text) for text in options.arms]
    arm_runs = plan_runs(config, arms, range(seed, seed + options.num_seeds), options.num_checkpoints)
    controls = make_controls(arms, seed, config.adapter.lora_init_seed) if options.controls else []
    control_runs = plan_runs(config, [control.arm for control in controls], [seed], options.num_checkpoints)
    return Plan(arms, arm_runs, controls, control_runs)


def read_experiment(config: TrainConfig, options: CompareConfig, forecast: Forecast | None = None) -> Experiment:
    """Plan the experiment of the settings and read its inputs. Raises ConfigError for invalid settings or images."""
    check_workers(options.workers, options.cluster)
    plan = plan_experiment(config, options)
    inputs = read_inputs(config, options)  # last, because it takes longest
    return Experiment(config, options, inputs, *plan, forecast)


def _check_same_base(config: TrainConfig, base: Base, runs: Sequence[PlannedRun]) -> None:
    if config.model.quantize_base is not None:
        return  # the hash of the quantized weights differs
    fingerprint = base_fingerprint(base.denoiser)
    for planned in runs:
        for event in planned.run.events():
            if event["event"] == "start" and event["base"] != fingerprint:
                raise ConfigError(
                    f"run {planned.arm.key}, seed {planned.seed} was trained on a base other than "
                    f"{config.model.pretrained_model_name_or_path!r} is now: restore the base, or give another "
                    "--output_dir"
                )
