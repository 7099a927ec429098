"""Check before a run starts that the disks have room for its files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.families.device import this_process
from flatlora_diffusion.memory.disk import DiskNeed, class_images_need, disk_need
from flatlora_diffusion.memory.estimate import in_gib

logger = logging.getLogger(__name__)


class _DiskUse(NamedTuple):
    """Files that a run writes into the folder of a setting, and their bytes."""

    setting: str
    folder: Path
    files: str
    size: int


def check_disk_space(config: TrainConfig) -> None:
    """Log the space that a run needs and that is free on each disk.

    Raises:
        ConfigError: a checkpoint, the result and the missing class images do not fit.
    """
    try:
        need, class_images = disk_need(config), class_images_need(config)
    except ConfigError:
        return  # the base is not downloaded yet, or loading it will raise the error
    except Exception as error:
        logger.warning("the run's disk space could not be estimated: %s", error)
        return
    out = Path(config.run.output_dir)
    uses = [
        _DiskUse("output_dir", out, "a checkpoint", need.checkpoint),
        _DiskUse("output_dir", out, "the result", need.result),
        _DiskUse(
            "class_data_dir", Path(str(config.data.class_data_dir)), "the class images to be drawn", class_images
        ),
    ]
    for uses_of_disk in _by_disk([use for use in uses if use.size]):
        _check_disk(uses_of_disk)
    _warn_of_checkpoints(config, need)


def free_bytes(folder: Path) -> int:
    """The free bytes on the disk of a folder, which need not exist."""
    return shutil.disk_usage(_nearest_existing(folder)).free


def _check_disk(uses: list[_DiskUse]) -> None:
    first, free = uses[0], free_bytes(uses[0].folder)
    needed = sum(use.size for use in uses)
    parts = ", ".join(f"{use.files} {in_gib(use.size)}" for use in uses)
    if needed > free:
        raise ConfigError(
            f"{first.setting}={str(first.folder)!r} is on a disk with {in_gib(free)} free, but the run "
            f"needs about {in_gib(needed)} ({parts}); free some space, or give a folder on another disk"
        )
    if this_process().is_main_process:
        logger.info("needs about %s of disk space (%s), %s free", in_gib(needed), parts, in_gib(free))


def _warn_of_checkpoints(config: TrainConfig, need: DiskNeed) -> None:
    run, steps = config.run, config.optim.max_train_steps
    if steps is None or not this_process().is_main_process:
        return
    count = steps // run.checkpointing_steps
    count = min(count, count if run.checkpoints_total_limit is None else run.checkpoints_total_limit + 1)
    fits = (free_bytes(Path(run.output_dir)) - need.result) // need.checkpoint
    if count > fits:
        logger.warning(
            "the disk has room for %d of the %d checkpoints of %s each; free some space, or give a lower "
            "--checkpoints_total_limit or a higher --checkpointing_steps",
            fits,
            count,
            in_gib(need.checkpoint),
        )


def _by_disk(uses: list[_DiskUse]) -> Iterator[list[_DiskUse]]:
    devices = [os.stat(_nearest_existing(use.folder)).st_dev for use in uses]
    for device in dict.fromkeys(devices):
        yield [use for use, its_device in zip(uses, devices, strict=True) if its_device == device]


def _nearest_existing(folder: Path) -> Path:
    path = folder.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())
