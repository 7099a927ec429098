"""Writes LoRA files in kohya's layout, and verifies written files against the updates that they should contain."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.adapter.delta import (
    Update,
    Updates,
    difference,
    norm,
)
from flatlora_diffusion.config import RunError
from flatlora_diffusion.lora_files.kohya import kohya_name
from flatlora_diffusion.lora_files.metadata import LEGACY_END, with_content_keys
from flatlora_diffusion.storage.run_dir import BESIDE_LORA
from flatlora_diffusion.storage.tensor_io import contents_of, save_stream

logger = logging.getLogger(__name__)

_STARTED = "ss_training_started_at"


def save_kohya(path: Path, tensors: Callable[[], Iterable[tuple[str, Tensor]]], metadata: Mapping[str, str]) -> None:
    """Write a kohya file tensor by tensor, adding rank, alpha and hashes to the metadata."""
    contents = contents_of(tensors(), LEGACY_END)
    save_stream(path, tensors, contents, with_content_keys(metadata, contents))


def updates_from_kohya(tensors: Mapping[str, Tensor], expected: Updates, layers_per_block: int) -> Updates:
    """Read the updates of the layers of `expected` from a kohya file. Raises KeyError for a missing layer."""
    updates: dict[str, dict[str, Update]] = {}
    for part, layers in expected.items():
        for module in layers:
            name = kohya_name(part, module, layers_per_block)
            down, up = (tensors[f"{name}.lora_{side}.weight"].float() for side in ("down", "up"))
            updates.setdefault(part, {})[module] = Update(down, up, float(tensors[f"{name}.alpha"]) / len(down))
    return updates


def check_updates(path: Path, saved: Updates, expected: Updates, dtype: torch.dtype) -> float:
    """Return the largest relative error of a layer's update in a file, ||saved - expected|| / ||expected||.

    Raises:
        RunError: An error is larger than rounding to `dtype` explains.
    """
    largest = 0.0
    for part, layers in expected.items():
        for module, update in layers.items():
            of_file = saved[part][module]
            allowed = _rounding_error(of_file, dtype)
            error, size = difference(of_file, update), norm(update)
            if not error <= allowed:
                raise RunError(
                    f"{path.name} was not saved correctly: {part}.{module} is off by {error:.3g} of {size:.3g}; check "
                    "the disk, or save as bf16 or fp32"
                )
            largest = max(largest, error / size if size else 0.0)
    return largest


def _rounding_error(saved: Update, dtype: torch.dtype) -> float:
    """Upper bound on the change of the product when both factors are rounded to `dtype`."""
    unit = torch.finfo(dtype).eps / 2
    down, up = float(saved.down.double().norm()), float(saved.up.double().norm())
    # A subnormal entry is off by up to half of the smallest step.
    least = torch.finfo(dtype).smallest_normal * unit
    below = least * (math.sqrt(saved.down.numel()) * up + math.sqrt(saved.up.numel()) * down)
    # 1e-7: traces in double precision distinguish two products to about 1e-8 of their factors' size.
    return ((2.1 * unit + 1e-7) * down * up + 1.1 * below) * saved.scale


def updates_from_diffusers(tensors: Mapping[str, Tensor], expected: Updates) -> Updates:
    return {
        part: {
            module: Update(
                tensors[f"{part}.{module}.lora_A.weight"].float(), tensors[f"{part}.{module}.lora_B.weight"].float(), 1
            )
            for module in layers
        }
        for part, layers in expected.items()
    }


def check_finite(updates: Updates) -> None:
    for part, layers in updates.items():
        for module, update in layers.items():
            if not all(bool(factor.isfinite().all()) for factor in (update.down, update.up)):
                raise RunError(
                    f"the LoRA has a NaN or an infinity at {part}.{module}: resume from an earlier checkpoint with a "
                    "lower --learning_rate"
                )


def check_magnitudes(path: Path, expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    saved = load_file(path)
    for part, layers in expected.items():
        for module, value in layers.items():
            if not torch.equal(saved[f"{part}.{module}.lora_magnitude_vector"], value):
                raise RunError(f"{path.name} has wrong magnitudes at {part}.{module}: check the disk")


def rename_existing(path: Path, metadata: Mapping[str, str]) -> None:
    """Rename a LoRA file at `path`, and the files beside it, unless the run of `metadata` wrote it."""
    if path.exists() and _is_of_run(path, metadata):
        return
    for existing in (path, *(path.with_name(path.stem + ending) for ending in BESIDE_LORA)):
        if existing.exists():
            number = 1
            while (target := existing.with_name(f"{existing.stem}-earlier-{number}{existing.suffix}")).exists():
                number += 1
            os.rename(existing, target)
            logger.warning("%s already existed and is now %s", existing.name, target.name)


def _is_of_run(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the run of `metadata`, identified by its start time, wrote the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_STARTED) == metadata[_STARTED]
    except (OSError, SafetensorError):
        return False
