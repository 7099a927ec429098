"""Whether the disks have room for what a run writes, looked at before it starts."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.memory.disk import DiskNeed, class_images_need, disk_need
from flatlora_diffusion.memory.estimate import in_gib
from flatlora_diffusion.sdxl.device import this_process

logger = logging.getLogger(__name__)


class _Share(NamedTuple):
    """Something that goes into the folder of a setting, and its bytes."""

    setting: str
    folder: Path
    what: str
    size: int


def check_room(config: TrainConfig) -> None:
    """Log what the run writes and what is free. Raises ConfigError where not even one checkpoint and the result fit.

    The class images that are still to be drawn count with them where they go onto the same disk.
    """
    try:
        need, images = disk_need(config), class_images_need(config)
    except ConfigError:
        return  # of the base itself, which is not here yet or will say so
    except Exception as error:
        logger.warning("the disk that the run needs could not be estimated: %s", error)
        return
    out = Path(config.run.output_dir)
    shares = [
        _Share("output_dir", out, "a checkpoint", need.checkpoint),
        _Share("output_dir", out, "the result", need.result),
        _Share("class_data_dir", Path(str(config.data.class_data_dir)), "the class images to be drawn", images),
    ]
    for on_disk in _by_disk([share for share in shares if share.size]):
        _check_disk(on_disk)
    _tell_of_all_checkpoints(config, need)


def free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


def _check_disk(shares: list[_Share]) -> None:
    """Of what goes onto one disk."""
    first, free = shares[0], free_bytes(shares[0].folder)
    needed = sum(share.size for share in shares)
    parts = ", ".join(f"{share.what} {in_gib(share.size)}" for share in shares)
    if needed > free:
        raise ConfigError(
            f"{first.setting}={str(first.folder)!r} is on a disk with {in_gib(free)} free, but about {in_gib(needed)} "
            f"are needed ({parts}); make room, or give a folder on another disk"
        )
    if this_process().is_main_process:
        logger.info("about %s on disk needed (%s), %s free", in_gib(needed), parts, in_gib(free))


def _tell_of_all_checkpoints(config: TrainConfig, need: DiskNeed) -> None:
    """Warn of checkpoints that will not all fit."""
    run, steps = config.run, config.optim.max_train_steps
    if steps is None or not this_process().is_main_process:
        return
    count = steps // run.checkpointing_steps
    count = min(count, count if run.checkpoints_total_limit is None else run.checkpoints_total_limit + 1)
    fits = (free_bytes(Path(run.output_dir)) - need.result) // need.checkpoint
    if count > fits:
        logger.warning(
            "the disk has room for %d of the %d checkpoints of %s each; make room, or give a lower "
            "--checkpoints_total_limit or a higher --checkpointing_steps",
            fits,
            count,
            in_gib(need.checkpoint),
        )


def _by_disk(shares: list[_Share]) -> Iterator[list[_Share]]:
    disks = [os.stat(_existing(share.folder)).st_dev for share in shares]
    for disk in dict.fromkeys(disks):
        yield [share for share, its_own in zip(shares, disks, strict=True) if its_own == disk]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    whole = folder.absolute()
    return next(place for place in (whole, *whole.parents) if place.exists())
