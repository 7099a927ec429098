"""Writes and verifies the two files of a trained LoRA: one for diffusers, one in kohya's layout for other tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.adapter.delta import Updates
from flatlora_diffusion.lora_files.diffusers_file import iter_peft_tensors, save_diffusers_file
from flatlora_diffusion.lora_files.kohya import kohya_tensors
from flatlora_diffusion.lora_files.writing import (
    check_magnitudes,
    check_updates,
    rename_existing,
    save_kohya,
    updates_from_diffusers,
    updates_from_kohya,
)
from flatlora_diffusion.storage.atomic_io import atomic_write, write_text
from flatlora_diffusion.storage.run_dir import LORA_FILE


@dataclass(frozen=True)
class FilePair:
    """The paths and contents of both files.

    Attributes:
        kohya: The path of the file for other tools; diffusers' file lies beside it.
        layers_per_block: of the UNet; None for a denoiser without kohya's layout, whose files both have diffusers'.
        copy: A second path for the kohya file.
        metadata: The metadata of the kohya file.
        sidecar: The JSON beside the kohya file, which web UIs show.
        plain: The updates of the kohya file, those of a plain LoRA.
        trained: The updates of diffusers' file.
        magnitudes: DoRA's magnitudes in diffusers' file.
    """

    kohya: Path
    copy: Path | None
    metadata: Mapping[str, str]
    sidecar: Mapping[str, Any] | None
    plain: Updates
    trained: Updates
    magnitudes: Mapping[str, Mapping[str, Tensor]]
    layers_per_block: int | None
    dtype: torch.dtype

    @property
    def diffusers(self) -> Path:
        return self.kohya.with_name(LORA_FILE)


def write_pair(pair: FilePair, pipeline: Any) -> None:
    """Write both files; files of other runs with the same names are renamed first."""
    rename_existing(pair.kohya, pair.metadata)
    if pair.layers_per_block is None:
        save_kohya(pair.kohya, partial(iter_peft_tensors, pair.plain, pair.dtype), pair.metadata)
    else:
        tensors = partial(kohya_tensors, pair.plain, pair.layers_per_block, pair.dtype)
        save_kohya(pair.kohya, tensors, pair.metadata)
    if pair.copy is not None:
        with atomic_write(pair.copy) as temporary:
            shutil.copyfile(pair.kohya, temporary)
    if pair.sidecar is not None:
        text = json.dumps(pair.sidecar, indent=2, ensure_ascii=False)
        write_text(pair.kohya.with_suffix(".json"), text + "\n")
    save_diffusers_file(pipeline, pair.trained, pair.magnitudes, pair.diffusers, pair.dtype)


def verify_pair(pair: FilePair) -> float:
    """Read both files back and return the largest relative error of a layer's update.

    Raises:
        RunError: A file differs from the pair's contents by more than rounding to its precision explains.
    """
    largest, of_kohya = 0.0, updates_from_diffusers
    if pair.layers_per_block is not None:
        of_kohya = partial(updates_from_kohya, layers_per_block=pair.layers_per_block)
    for path, read, expected in (
        (pair.kohya, of_kohya, pair.plain),
        (pair.diffusers, updates_from_diffusers, pair.trained),
    ):
        largest = max(largest, check_updates(path, read(load_file(path), expected), expected, pair.dtype))
    check_magnitudes(pair.diffusers, pair.magnitudes)
    return largest
