"""Estimates before a training: time from earlier runs, memory and disk from the settings."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatlora_diffusion.config import METHODS, ConfigError, TrainConfig
from flatlora_diffusion.data import epochs
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.saved_config import portable

from ..context import AppContext
from ..process.json_file import read_json
from ..runs.runs import RunStore

if TYPE_CHECKING:
    from flatlora_diffusion.memory.estimate import MemoryEstimate

# What a step's time depends on most; the method comes on top, since Flat-LoRA draws noise in each step.
_SPEED_SETTINGS = (
    "pretrained_model_name_or_path",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "quantize_base",
)
# Models are rehearsed under a default dtype, which all threads share: one at a time, or they mix.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds for all steps of a training, including members, at the speed of `run`."""

    seconds: float
    seconds_per_step: float
    steps: int
    run: str


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes that the trainings of one start write, and free bytes on the disk of the runs."""

    needed: int
    free: int

    @property
    def is_enough(self) -> bool:
        return self.needed < self.free


def total_steps(config: TrainConfig, images: int) -> int:
    """The optimizer steps of a training on one device with `images` images."""
    return epochs.total_steps(config, images * config.data.repeats)


def estimate_time(config: TrainConfig, images: int, runs: RunStore) -> TimeEstimate | None:
    """Estimate from the last run with the same base, size and batch; None if there is none.

    A run of another method is scaled by the passes of both methods.
    """
    wanted = portable(config.to_dict())
    alike = []
    for run in runs.all():
        saved = read_json(RunDir(run.folder).config_file)
        if run.progress.seconds_per_step is not None and _is_as_fast(saved, wanted):
            alike.append((run, run.progress.seconds_per_step))
    best = next((pair for pair in alike if pair[0].method == config.perturb.method), alike[0] if alike else None)
    if best is None:
        return None
    run, seconds = best
    if run.method in METHODS:
        seconds *= METHODS[config.perturb.method].passes / METHODS[run.method].passes
    steps = total_steps(config, images) * config.average.trainings
    return TimeEstimate(steps * seconds, seconds, steps, run.name)


@lru_cache(maxsize=32)
def memory_of(config: TrainConfig) -> MemoryEstimate | None:
    """GPU memory of the training; None for settings that fit no base. The first call takes seconds.

    A base that is not on this computer counts as the usual one of its family.
    """
    from flatlora_diffusion.memory.estimate import estimate_memory  # imports torch and diffusers

    try:
        with _ONE_AT_A_TIME:
            return estimate_memory(config)
    except ConfigError:
        return None


def has_gpu() -> bool:
    """Whether trainings here run on a GPU."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def estimate_disk(config: TrainConfig, images: int, folder: Path, arms: int = 1) -> DiskEstimate:
    """Bytes that `arms` trainings write into `folder`: results and checkpoints, also of members."""
    from flatlora_diffusion.memory.disk import run_bytes  # imports torch and diffusers

    count = total_steps(config, images) // config.run.checkpointing_steps
    if config.run.checkpoints_total_limit is not None:
        count = min(count, config.run.checkpoints_total_limit)
    with _ONE_AT_A_TIME:
        needed = arms * run_bytes(config, max(1, count))
    return DiskEstimate(needed, shutil.disk_usage(folder).free)


def _is_as_fast(saved: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """A resolution that is left open is the base's own, which the saved run has found."""
    is_same_size = wanted["resolution"] in (None, saved.get("resolution"))
    return is_same_size and all(wanted[name] == saved.get(name) for name in _SPEED_SETTINGS)


def disk_estimate(context: AppContext, config: TrainConfig, images: int, arms: int) -> DiskEstimate | None:
    """The disk space of `arms` trainings on `images` images (0: unknown); None for settings that fit no base."""
    memory = memory_of(config)
    return None if memory is None else estimate_disk(config, images or 1, context.runs.folder, arms)


def disk_line(disk: DiskEstimate) -> str:
    """HTML; red without enough room."""
    message = f"disk: {_size(disk.needed)}, {_size(disk.free)} free"
    return f"{message} (enough room)" if disk.is_enough else f'<b class="fl-bad">{message} (NOT ENOUGH ROOM)</b>'


def disk_full_text(disk: DiskEstimate) -> str:
    """HTML: the reason why a training was not started."""
    return (
        f"<b>Not started.</b> It would write about {_size(disk.needed)}, and {_size(disk.free)} are free on the disk "
        "with the runs. It fails at the first checkpoint that finds no room. Free some, or start it anyway."
    )


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.0f} GiB"
