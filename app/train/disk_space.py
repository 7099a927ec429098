"""Whether the disk has room for a training."""

from __future__ import annotations

from flatlora_diffusion.config import TrainConfig

from ..context import AppContext
from ..widgets.messages import note
from .estimates import DiskEstimate, estimate_disk, memory_of


def disk_estimate(context: AppContext, config: TrainConfig, images: int, arms: int) -> DiskEstimate | None:
    """The disk space of `arms` trainings on `images` images (0: unknown); None for settings that fit no base."""
    memory = memory_of(config)
    return None if memory is None else estimate_disk(config, images or 1, context.runs.folder, arms)


def disk_line(disk: DiskEstimate) -> str:
    """HTML; red without enough room."""
    message = f"disk: {_size(disk.needed)}, {_size(disk.free)} free"
    return f"{message} (enough room)" if disk.is_enough else f'<b class="fl-bad">{message} (NOT ENOUGH ROOM)</b>'


def disk_full_notice(disk: DiskEstimate) -> str:
    """The reason why a training was not started."""
    return note(
        f"<b>Not started.</b> It would write about {_size(disk.needed)}, and {_size(disk.free)} are free on the disk "
        "with the runs. It fails at the first checkpoint that finds no room. Free some, or start it anyway.",
        "fl-bad",
    )


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.0f} GiB"
