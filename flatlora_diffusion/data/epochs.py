"""How many optimizer steps an epoch and a run have, as diffusers' script counts them."""

from __future__ import annotations

import math

from flatlora_diffusion.config import TrainConfig


def steps_per_epoch(config: TrainConfig, shown: int, processes: int) -> int:
    """The optimizer steps of an epoch that shows `shown` images.

    More class images than that lengthen the epoch; batches and steps are rounded up.
    """
    if config.data.with_prior_preservation:
        shown = max(shown, config.data.num_class_images)
    batches = math.ceil(shown / config.optim.train_batch_size)
    return math.ceil(batches / (config.optim.gradient_accumulation_steps * processes))


def total_steps(config: TrainConfig, shown: int, processes: int = 1) -> int:
    """The optimizer steps of a run: those that are given, or those of its epochs."""
    optim = config.optim
    return optim.max_train_steps or optim.num_train_epochs * steps_per_epoch(config, shown, processes)
