"""How many steps few images need: each is held out once, by a run on the others, before the run on all of them.

Folds are runs of their own in `holdout-fold-N/`. What they have done is kept: the same command goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list

from flatlora_diffusion.adapter.new_tokens import in_captions, new_tokens
from flatlora_diffusion.config import RunError, StoppedError, TrainConfig
from flatlora_diffusion.data.dataset import Sample, SampleSet, manifest
from flatlora_diffusion.data.sources import Fold, load_training_set, split_fold
from flatlora_diffusion.sdxl.device import this_process
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.checkpoint import best_step
from flatlora_diffusion.training.resolve_config import check_early, is_made_with, new_or_resumed
from flatlora_diffusion.training.stopping import Interrupted

logger = logging.getLogger(__name__)

TrainFold = Callable[[TrainConfig, RunDir, SampleSet, Fold], Path]
_GO_ON = "the same command goes on from there"


def chosen_by_folds(given: TrainConfig, run: RunDir, train_fold: TrainFold) -> tuple[TrainConfig, SampleSet, int]:
    """The settings for the run on all images, with a seed, these images, and the number of steps that it is to take.

    `train_fold` trains a fold of them in a folder of its own. Raises ConfigError as a training does, StoppedError for
    a stop between the folds.
    """
    began = time.monotonic()
    config = new_or_resumed(_with_seed_of_folds(given, run), run)
    if this_process().is_main_process:
        run.clean()
    check_early(config)
    found, count = load_training_set(config.data), config.data.holdout_folds
    sizes, losses = [], []
    for fold in (Fold(number, count) for number in range(1, count + 1)):
        ours, theirs = split_fold(found.samples, *fold)
        inner = run.fold(fold.number)
        mine = _of_fold(_with_time_left(config, began), inner, len(theirs))
        if _is_done(inner, mine, ours, theirs):
            logger.info("fold %d of %d: already trained in %s", *fold, inner.folder)
        else:
            logger.info("fold %d of %d: trains on %d images, %d are held out", *fold, len(ours), len(theirs))
            _train_one(mine, inner, found, fold, train_fold)
        sizes.append(len(theirs))
        losses.append(inner.holdout_losses())
    (is_asked,) = broadcast_object_list([run.stop_file.exists()])  # all processes go one way
    if is_asked:
        raise StoppedError(f"stopped after the last fold by the stop file; {_GO_ON}")
    return _with_time_left(config, began), found, _chosen(losses, sizes)


def mean_losses(losses: Sequence[Mapping[int, float]], sizes: Sequence[int]) -> dict[int, float]:
    """The mean over all images of the loss that each had in the fold that held it out, by steps.

    Folds hold out `sizes` images; steps that not all of them have measured are left out.
    """
    steps = sorted(set(losses[0]).intersection(*losses[1:]))
    return {
        step: sum(size * of_fold[step] for size, of_fold in zip(sizes, losses, strict=True)) / sum(sizes)
        for step in steps
    }


def _chosen(losses: Sequence[Mapping[int, float]], sizes: Sequence[int]) -> int:
    means = mean_losses(losses, sizes)
    best = best_step(means)
    told = ", ".join(f"{step}: {loss:.4f}" for step, loss in means.items())
    logger.info("loss of all images, each in the fold that held it out, by steps: %s", told)
    more = "; it still fell at the end, so more --max_train_steps may be better" if best == max(means) else ""
    logger.info("the run on all images takes %d steps%s", best, more)
    return best


def _train_one(config: TrainConfig, inner: RunDir, found: SampleSet, fold: Fold, train_fold: TrainFold) -> None:
    """Train a fold, or go on with it. What ends it says in which fold that was."""
    where = f"fold {fold.number} of {fold.of}"
    if _is_begun(inner, config, *split_fold(found.samples, *fold)):
        config = config.replace(resume_from_checkpoint="latest")
    if this_process().is_main_process:
        inner.folder.mkdir(exist_ok=True)
    try:
        train_fold(config, inner, found, fold)
    except StoppedError as error:
        raise StoppedError(f"{where}: {str(error).partition('; ')[0]}; {_GO_ON}") from error
    except RunError as error:
        raise RunError(f"{where}: {error}") from error
    except Interrupted as error:
        raise Interrupted(error.number, f"in {where}; {_GO_ON}") from error


def _with_seed_of_folds(config: TrainConfig, run: RunDir) -> TrainConfig:
    """A seed that was drawn for the first fold is that of all."""
    first = run.fold(1)
    if config.run.seed is not None or not first.config_file.is_file():
        return config
    return config.replace(seed=first.config()["seed"])


def _with_time_left(config: TrainConfig, began: float) -> TrainConfig:
    """--max_train_seconds is for folds and run together."""
    most = config.optim.max_train_seconds
    return config if most is None else config.replace(max_train_seconds=max(1.0, most - (time.monotonic() - began)))


def _of_fold(config: TrainConfig, inner: RunDir, heldout: int) -> TrainConfig:
    """The settings of a fold: it draws and uploads nothing, and keeps what it needs to go on."""
    return config.replace(
        holdout_folds=0,
        holdout_images=heldout,
        output_dir=str(inner.folder),
        output_name=None,
        checkpoints_total_limit=1,
        resume_from_checkpoint=None,
        validation_prompt=None,
        validation_prompts_file=None,
        validation_data_dir=None,
        push_to_hub=False,
    )


def _is_done(inner: RunDir, config: TrainConfig, ours: Sequence[Sample], theirs: Sequence[Sample]) -> bool:
    """Whether the fold has measured all that it is to measure, with these settings and images."""
    steps = config.optim.max_train_steps
    assert steps is not None
    points = {*range(config.run.checkpointing_steps, steps, config.run.checkpointing_steps), steps}
    return is_same_run(inner, config, ours, theirs) and points <= inner.holdout_losses().keys()


def _is_begun(inner: RunDir, config: TrainConfig, ours: Sequence[Sample], theirs: Sequence[Sample]) -> bool:
    """Whether the fold has a checkpoint to go on from, with all that was to be measured before it."""
    if not inner.checkpoints() or not is_same_run(inner, config, ours, theirs):
        return False
    done = int(inner.checkpoints()[-1].name.split("-")[1])
    points = set(range(config.run.checkpointing_steps, done, config.run.checkpointing_steps))
    return points <= inner.holdout_losses().keys()


def is_same_run(inner: RunDir, config: TrainConfig, ours: Sequence[Sample], theirs: Sequence[Sample]) -> bool:
    """Whether the run has these settings, trains on images and captions `ours` and holds out `theirs`."""
    if not is_made_with(inner, config):
        return False
    tokens = new_tokens(config.tokens) if config.tokens.train_text_encoder_ti else {}
    rows = inner.manifest()
    trained = [row for row in rows if not row.get("is_held_out")][: len(ours)]  # class images stand behind them
    away = [row for row in rows if row.get("is_held_out")]
    wanted = [{**row, "is_held_out": True} for row in manifest(theirs)]
    return trained == manifest(in_captions(ours, tokens)) and away == wanted
