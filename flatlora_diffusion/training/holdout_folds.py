"""Choose the number of steps by cross-validation (`--holdout_folds`), then train on all images.

Each fold is a run in `holdout-fold-N/` that holds out its part of the images. The same command resumes the folds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset import SampleSet
from flatlora_diffusion.data.sources import Fold, load_training_set, split_fold
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.checkpoint import best_step
from flatlora_diffusion.training.resolve_config import resolve
from flatlora_diffusion.training.sub_runs import (
    check_stop,
    is_same_run,
    sub_run_config,
    training_of,
    with_saved_seed,
    with_time_left,
)

logger = logging.getLogger(__name__)

TrainFold = Callable[[TrainConfig, RunDir, SampleSet, Fold], Path]


def choose_steps_by_folds(
    requested: TrainConfig, run: RunDir, train_fold: TrainFold
) -> tuple[TrainConfig, SampleSet, int]:
    """Train the folds by `train_fold` and find the number of steps with the lowest mean held-out loss.

    Returns settings, images and number of steps of the run on all images. Raises as a training does.
    """
    start_time = time.monotonic()
    config = resolve(with_saved_seed(requested, run.fold(1)), run)
    images, count = load_training_set(config.data), config.data.holdout_folds
    sizes, losses = [], []
    for fold in (Fold(number, count) for number in range(1, count + 1)):
        training, heldout = split_fold(images.samples, *fold)
        fold_run, name = run.fold(fold.number), f"fold {fold.number} of {fold.of}"
        changes = {"holdout_folds": 0, "holdout_images": len(heldout), "checkpoints_total_limit": 1}
        fold_config = sub_run_config(with_time_left(config, start_time), fold_run, **changes)
        is_same = is_same_run(fold_run, fold_config, training, heldout)
        if is_same and _is_complete(fold_run, fold_config):
            logger.info("%s: already trained in %s", name, fold_run.folder)
        else:
            logger.info("%s: trains on %d images, %d are held out", name, len(training), len(heldout))
            if is_same and _is_resumable(fold_run, fold_config):
                fold_config = fold_config.replace(resume_from_checkpoint="latest")
            with training_of(fold_run, name):
                train_fold(fold_config, fold_run, images, fold)
        sizes.append(len(heldout))
        losses.append(fold_run.holdout_losses())
    check_stop(run, "the last fold")
    return with_time_left(config, start_time), images, _best_step(losses, sizes)


def mean_losses(losses: Sequence[Mapping[int, float]], sizes: Sequence[int]) -> dict[int, float]:
    """The mean held-out loss of all images by step, for the steps that all folds have measured.

    `losses` has each fold's loss by step, `sizes` the number of images that each holds out.
    """
    steps = sorted(set(losses[0]).intersection(*losses[1:]))
    return {
        step: sum(size * fold_losses[step] for size, fold_losses in zip(sizes, losses, strict=True)) / sum(sizes)
        for step in steps
    }


def _best_step(losses: Sequence[Mapping[int, float]], sizes: Sequence[int]) -> int:
    means = mean_losses(losses, sizes)
    best = best_step(means)
    logger.info("mean held-out loss by steps: %s", ", ".join(f"{step}: {loss:.4f}" for step, loss in means.items()))
    hint = "; it still fell at the end, so more --max_train_steps may be better" if best == max(means) else ""
    logger.info("the run on all images takes %d steps%s", best, hint)
    return best


def _is_complete(fold_run: RunDir, config: TrainConfig) -> bool:
    """Whether the fold has measured all its checkpoints and its end."""
    steps = config.optim.max_train_steps
    assert steps is not None
    return {*_checkpoints(config, before=steps), steps} <= fold_run.holdout_losses().keys()


def _is_resumable(fold_run: RunDir, config: TrainConfig) -> bool:
    """Whether the fold has a checkpoint, and has measured all those before it."""
    if not fold_run.checkpoints():
        return False
    done = int(fold_run.checkpoints()[-1].name.split("-")[1])
    return set(_checkpoints(config, before=done)) <= fold_run.holdout_losses().keys()


def _checkpoints(config: TrainConfig, before: int) -> range:
    return range(config.run.checkpointing_steps, before, config.run.checkpointing_steps)
