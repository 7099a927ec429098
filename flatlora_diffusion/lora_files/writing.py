"""Writes LoRA files and compares what a written file holds with what was to be saved."""

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
from flatlora_diffusion.lora_files.metadata import LEGACY_END, with_contents
from flatlora_diffusion.storage.run_dir import BESIDE_LORA
from flatlora_diffusion.storage.tensor_io import contents_of, save_stream

logger = logging.getLogger(__name__)

_STARTED = "ss_training_started_at"


def save_kohya(path: Path, tensors: Callable[[], Iterable[tuple[str, Tensor]]], metadata: Mapping[str, str]) -> None:
    """Write the tensors of a kohya file one by one; rank, alpha and hashes are added to the metadata."""
    contents = contents_of(tensors(), LEGACY_END)
    save_stream(path, tensors, contents, with_contents(metadata, contents))


def kohya_updates(tensors: Mapping[str, Tensor], expected: Updates, layers_per_block: int) -> Updates:
    """The updates that a kohya file has for the layers of `expected`. Raises KeyError for a layer that it lacks."""
    updates: dict[str, dict[str, Update]] = {}
    for part, layers in expected.items():
        for module in layers:
            name = kohya_name(part, module, layers_per_block)
            down, up = (tensors[f"{name}.lora_{side}.weight"].float() for side in ("down", "up"))
            updates.setdefault(part, {})[module] = Update(down, up, float(tensors[f"{name}.alpha"]) / len(down))
    return updates


def check_updates(path: Path, saved: Updates, expected: Updates, dtype: torch.dtype) -> float:
    """The largest relative error of a layer's update in a file, ||saved - expected|| / ||expected||.

    Raises RunError for an error that rounding to `dtype` does not explain.
    """
    largest = 0.0
    for part, layers in expected.items():
        for module, update in layers.items():
            of_file = saved[part][module]
            allowed = _rounding(of_file, dtype)
            error, size = difference(of_file, update), norm(update)
            if not error <= allowed:
                raise RunError(
                    f"{path.name} does not hold what was to be saved: {part}.{module} is off by {error:.3g} of "
                    f"{size:.3g}; if the disk is sound, save it as bf16 or fp32"
                )
            largest = max(largest, error / size if size else 0.0)
    return largest


def _rounding(saved: Update, dtype: torch.dtype) -> float:
    """The most by which rounding both factors, each entry to the nearest of its `dtype`, can change their product."""
    unit = torch.finfo(dtype).eps / 2
    down, up = float(saved.down.double().norm()), float(saved.up.double().norm())
    # An entry below the normal range is off by half of the smallest step there is.
    least = torch.finfo(dtype).smallest_normal * unit
    below = least * (math.sqrt(saved.down.numel()) * up + math.sqrt(saved.up.numel()) * down)
    # Double-precision traces tell two products apart to about 1e-8 of their factors' size.
    return ((2.1 * unit + 1e-7) * down * up + 1.1 * below) * saved.scale


def diffusers_updates(tensors: Mapping[str, Tensor], expected: Updates) -> Updates:
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
                    f"the LoRA is not finite at {part}.{module}: go on from an earlier checkpoint with a lower "
                    "--learning_rate"
                )


def check_magnitudes(path: Path, expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    saved = load_file(path)
    for part, layers in expected.items():
        for module, value in layers.items():
            if not torch.equal(saved[f"{part}.{module}.lora_magnitude_vector"], value):
                raise RunError(f"{path.name} does not hold the magnitudes of {part}.{module}: the disk is at fault")


def make_room(path: Path, metadata: Mapping[str, str]) -> None:
    """Give files of the names to be written another name unless the run that now writes `metadata` wrote them."""
    if path.exists() and _is_of_run(path, metadata):
        return
    for taken in (path, *(path.with_name(path.stem + ending) for ending in BESIDE_LORA)):
        if taken.exists():
            number = 1
            while (other := taken.with_name(f"{taken.stem}-earlier-{number}{taken.suffix}")).exists():
                number += 1
            os.rename(taken, other)
            logger.warning("%s was there already and is now %s", taken.name, other.name)


def _is_of_run(path: Path, metadata: Mapping[str, str]) -> bool:
    """A run is known by the moment at which it began."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_STARTED) == metadata[_STARTED]
    except (OSError, SafetensorError):
        return False
