"""The disk space of a run, computed on shapes: a checkpoint, the result and class images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from flatlora_diffusion.adapter.delta import FOLD_RANK
from flatlora_diffusion.config import ADAPTERS, TrainConfig
from flatlora_diffusion.data.images import SIDECAR_SUFFIXES
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.memory.estimate import optimizer_bytes, resolution_of
from flatlora_diffusion.memory.meta_step import TrainedModel, trained_shapes, weight_count

PIXEL = 1.6  # bytes per pixel of a PNG
_ENTRY = 160  # bytes per tensor in a file header
_FP32 = 4


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of a checkpoint, and of the other files of a finished run."""

    checkpoint: int
    result: int


def disk_need(config: TrainConfig) -> DiskNeed:
    """Estimate the disk space of a run without logs; a base that is not on this computer counts as SDXL.

    Raises:
        ConfigError: the LoRA settings match no layer of the base.
    """
    # A checkpoint contains the LoRA files and, in fp32, the weights, their nonzero start, the state of optimizer and
    # method and the EMA.
    trained, adapted = trained_shapes(TrainedModel(config.model, config.adapter))
    numbers, optim = sum(map(math.prod, trained)), config.optim
    copies = 1 + optim.use_ema + _copies_of_method(config)
    state = _FP32 * copies * numbers + sum(optimizer_bytes(shape, optim) for shape in trained)
    if config.perturb.draws_noise:
        state += _FP32 * sum(shape[0] for shape in adapted)  # row norms
    entries = _ENTRY * len(trained)
    files = _files(config, numbers, adapted) + 3 * entries
    merged = _merged(config) if config.adapter.adapter == "full" else 0
    return DiskNeed(state + (copies + 3) * entries + files, files + merged + _previews(config))


def run_bytes(config: TrainConfig, checkpoints: int) -> int:
    """Estimate the bytes that a run with so many checkpoints writes, those of its members included."""
    need, trainings = disk_need(config), config.average.trainings
    average = need.result * trainings if trainings > 1 else 0  # its rank is the sum of the members' ranks
    return trainings * (need.result + checkpoints * need.checkpoint) + average


def class_images_need(config: TrainConfig) -> int:
    """Return the bytes of the class images that are missing."""
    data = config.data
    if not data.with_prior_preservation:
        return 0
    folder = Path(str(data.class_data_dir))
    files = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    images = sum(not name.startswith(".") and not name.lower().endswith(SIDECAR_SUFFIXES) for name in files)
    return int(max(0, data.num_class_images - images) * PIXEL * resolution_of(config) ** 2)


def _copies_of_method(config: TrainConfig) -> int:
    """Return how many numbers per trained weight method and adapter save.

    PiSSA and LoRA-GA: the initial weights. AdaLoRA: two averages of importance. Bi-LoRA: a second LoRA with AdamW.
    """
    adapter = {"pissa": 1, "lora-ga": 1, "adalora": 2}.get(config.adapter.adapter, 0)
    return adapter + (3 if config.perturb.method == "bi-lora" else 0)


def _files(config: TrainConfig, numbers: int, adapted: Iterable[torch.Size]) -> int:
    """Return the bytes of the tensors in the LoRA files: in diffusers' and once or twice in kohya's format."""
    adapter = config.adapter

    def of_rank(rank: int) -> int:
        return sum(min(rank, *_matrix(shape)) * sum(_matrix(shape)) for shape in adapted)

    diffusers = kohya = 2 * numbers if ADAPTERS[adapter.adapter].has_nonzero_start else numbers
    if adapter.adapter == "full":
        diffusers = kohya = of_rank(adapter.rank)
    elif adapter.use_dora:
        kohya = of_rank(max(FOLD_RANK, adapter.rank))
    return DTYPES[config.run.save_dtype].itemsize * (diffusers + kohya * (1 + config.run.output_kohya_format))


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """Return (rows, inputs) of a layer."""
    return shape[0], math.prod(shape[1:])


def _merged(config: TrainConfig) -> int:
    """Return the bytes of the merged pipeline of full fine-tuning, with its VAE in fp32."""
    width = DTYPES[config.optim.precision_of_base].itemsize
    family = family_of(config.model)
    weights = sum(weight_count(config.model, part) for part in (family.denoiser, *family.text_parts))
    return width * weights + _FP32 * weight_count(config.model, "vae")


def _previews(config: TrainConfig) -> int:
    """Return the bytes of the first and last preview images and of the thumbnail of the LoRA."""
    pictures = len(config.run.preview_prompts) * config.run.num_validation_images
    return int((2 * pictures + bool(pictures)) * PIXEL * resolution_of(config) ** 2)
