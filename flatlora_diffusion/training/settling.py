"""The settings that a run leaves open, settled before anything is built: seed, precision, resolution and steps."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

from accelerate.utils import broadcast_object_list

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.data.schedule import schedule_of
from flatlora_diffusion.sdxl.device import this_process
from flatlora_diffusion.sdxl.pipeline import BaseFacts

logger = logging.getLogger(__name__)


def seeded(config: TrainConfig) -> TrainConfig:
    """`config` with a seed: its own, or one from the operating system, the same on all processes."""
    if config.run.seed is not None:
        return config
    this_process()  # starts the process group that the broadcast needs
    (seed,) = broadcast_object_list([secrets.randbelow(2**31)])
    logger.info("seed %d", seed)
    return config.replace(seed=seed)


def settled(
    config: TrainConfig, base: BaseFacts, shapes: Sequence[tuple[int, int]], precision: str, processes: int
) -> TrainConfig:
    """`config`, which has its seed, with nothing left open: a pure function, and of its own result the same.

    `shapes` are the (height, width) of the training images, `precision` is accelerate's. Raises ConfigError for a
    resolution or an objective that does not fit the base.
    """
    resolution = base.checked_resolution(config.data.resolution)
    if config.objective.snr_gamma is not None and base.is_edm:
        raise ConfigError("--snr_gamma does not fit this base, whose scheduler is EDM; leave it out")
    sized = config.replace(mixed_precision=precision, resolution=resolution)
    steps = schedule_of(sized, shapes, base.size_step, processes).total_steps
    return sized.replace(max_train_steps=steps)
