"""Runs within the folder of a run: the members of --members."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import broadcast_object_list

from flatlora_diffusion.adapter.new_tokens import new_tokens, replace_in_captions
from flatlora_diffusion.config import RunError, StoppedError, TrainConfig
from flatlora_diffusion.data.dataset import Sample, manifest
from flatlora_diffusion.families.device import this_process
from flatlora_diffusion.signals import Interrupted
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.resolve_config import is_made_with

RERUN_HINT = "the same command goes on from there"


def sub_run_config(config: TrainConfig, sub_run: RunDir, **changes: Any) -> TrainConfig:
    """The settings of a sub-run: `config` with `changes`, without previews, losses by image and upload."""
    return config.replace(
        output_dir=str(sub_run.folder),
        output_name=None,
        resume_from_checkpoint=None,
        validation_prompt=None,
        validation_prompts_file=None,
        validation_data_dir=None,
        image_loss_draws=0,
        push_to_hub=False,
        **changes,
    )


@contextmanager
def training_of(sub_run: RunDir, name: str) -> Iterator[None]:
    """Create the folder of a sub-run, and put its name into the errors that end its training."""
    if this_process().is_main_process:
        sub_run.folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except StoppedError as error:
        raise StoppedError(f"{name}: {str(error).partition('; ')[0]}; {RERUN_HINT}") from error
    except RunError as error:
        raise RunError(f"{name}: {error}") from error
    except Interrupted as error:
        raise Interrupted(error.number, f"in {name}; {RERUN_HINT}") from error


def check_stop(run: RunDir, name: str) -> None:
    """Raise StoppedError if the run's stop file has been written during the sub-run `name`."""
    (is_requested,) = broadcast_object_list([run.stop_file.exists()])  # all processes must agree
    if is_requested:
        raise StoppedError(f"stopped after {name} by the stop file; {RERUN_HINT}")


def with_saved_seed(config: TrainConfig, first: RunDir) -> TrainConfig:
    """`config` with the seed of the first sub-run if that was drawn before."""
    if config.run.seed is not None or not first.config_file.is_file():
        return config
    return config.replace(seed=first.config()["seed"])


def with_time_left(config: TrainConfig, start_time: float) -> TrainConfig:
    """`config` with the rest of --max_train_seconds, which all sub-runs share, since `start_time`."""
    limit = config.optim.max_train_seconds
    if limit is None:
        return config
    return config.replace(max_train_seconds=max(1.0, limit - (time.monotonic() - start_time)))


def is_same_run(sub_run: RunDir, config: TrainConfig, training: Sequence[Sample], heldout: Sequence[Sample]) -> bool:
    """Whether a sub-run was made with these settings, training images and held-out images, captions included."""
    if not is_made_with(sub_run, config):
        return False
    tokens = new_tokens(config.tokens) if config.tokens.train_text_encoder_ti else {}
    rows = sub_run.manifest()
    # Class images follow the training images.
    saved_training = [row for row in rows if not row.get("is_held_out")][: len(training)]
    saved_heldout = [row for row in rows if row.get("is_held_out")]
    return saved_training == manifest(replace_in_captions(training, tokens)) and saved_heldout == [
        {**row, "is_held_out": True} for row in manifest(heldout)
    ]
