"""What is compared, and with what: the arms and nulls, planned and trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flatlora_diffusion.compare.arms import Arm, PlannedRun, parse_arm, plan, train_planned
from flatlora_diffusion.compare.controls import Null, nulls_of
from flatlora_diffusion.compare.evaluator import BASE, RunEvaluator
from flatlora_diffusion.compare.inputs import Material, load_evaluator, read_material
from flatlora_diffusion.compare.parallel import train_at_once
from flatlora_diffusion.compare.picture_grid import poster_pieces
from flatlora_diffusion.compare.progress import Piece
from flatlora_diffusion.compare.shared_members import lend_members
from flatlora_diffusion.compare.timing import in_words, training_seconds
from flatlora_diffusion.compare.worker_slots import check_places
from flatlora_diffusion.config import CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.data.sources import load_training_set
from flatlora_diffusion.evaluation.finished_runs import check_images, read_runs
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.storage.hashing import base_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """The runs that are compared, and what they are measured with. `nulls` are the runs of the `pairs`."""

    config: TrainConfig
    own: CompareConfig
    material: Material
    arms: Sequence[Arm]
    main: Sequence[PlannedRun]
    pairs: Sequence[Null]
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
                is_new = not planned.is_finished
                lend_members(planned, self.runs)
                train_planned(planned)
                if is_new:
                    self._tell_what_is_left()
        found = read_runs([str(planned.run.folder) for planned in self.runs if planned.is_finished])
        check_images(found[0], load_training_set(self.config.data))

    def _tell_what_is_left(self) -> None:
        left = [planned for planned in self.runs if not planned.is_finished]
        if left:
            told = in_words(training_seconds(left, self.runs, 0.0))
            done = len(self.runs) - len(left)
            logger.info("%d of %d trainings are done, the others take about %s", done, len(self.runs), told)

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
    pairs = nulls_of(arms, seed, config.adapter.lora_init_seed) if own.controls else []
    nulls = plan(config, [null.arm for null in pairs], [seed], own.num_checkpoints)
    material = read_material(config, own)  # takes longest
    return Experiment(config, own, material, arms, main, pairs, nulls)


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
