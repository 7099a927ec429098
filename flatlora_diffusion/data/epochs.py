"""The number of optimizer steps of an epoch and a run; imports no torch, so that the app can show it immediately."""

from __future__ import annotations

import math

from flatlora_diffusion.config import TrainConfig


def steps_per_epoch(config: TrainConfig, samples: int, processes: int) -> int:
    """Return the optimizer steps of an epoch of `samples` samples, or of the class images if these are more.

    Batches and steps are rounded up, as in diffusers' script.
    """
    if config.data.with_prior_preservation:
        samples = max(samples, config.data.num_class_images)
    batches = math.ceil(samples / config.optim.train_batch_size)
    return math.ceil(batches / (config.optim.gradient_accumulation_steps * processes))


def total_steps(config: TrainConfig, samples: int, processes: int = 1) -> int:
    """Return the optimizer steps of a run: --max_train_steps, or those of --num_train_epochs."""
    optim = config.optim
    return optim.max_train_steps or optim.num_train_epochs * steps_per_epoch(config, samples, processes)
