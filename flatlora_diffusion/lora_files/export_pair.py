"""The two files of a trained LoRA, one for diffusers and one for every other tool: planned, written, read back."""

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
from flatlora_diffusion.lora_files.diffusers_file import save_updates
from flatlora_diffusion.lora_files.kohya import kohya_stream
from flatlora_diffusion.lora_files.writing import (
    check_magnitudes,
    check_updates,
    diffusers_updates,
    kohya_updates,
    make_room,
    save_kohya,
)
from flatlora_diffusion.storage.atomic_io import atomic_write, write_text
from flatlora_diffusion.storage.run_dir import LORA_FILE


@dataclass(frozen=True)
class FilePair:
    """Where both files go and what each is to hold."""

    for_others: Path
    copy: Path | None  # of it
    metadata: Mapping[str, str]  # of it
    sidecar: Mapping[str, Any] | None  # what web UIs show with it
    plain: Updates  # of it: those of a plain LoRA
    trained: Updates  # of diffusers' file
    magnitudes: Mapping[str, Mapping[str, Tensor]]  # of diffusers' file
    layers_per_block: int
    dtype: torch.dtype

    @property
    def for_diffusers(self) -> Path:
        return self.for_others.with_name(LORA_FILE)


def write_pair(pair: FilePair, pipeline: Any) -> None:
    """Write the files. Others of their names get another name first."""
    make_room(pair.for_others, pair.metadata)
    tensors = partial(kohya_stream, pair.plain, pair.layers_per_block, pair.dtype)
    save_kohya(pair.for_others, tensors, pair.metadata)
    if pair.copy is not None:
        with atomic_write(pair.copy) as aside:
            shutil.copyfile(pair.for_others, aside)
    if pair.sidecar is not None:
        text = json.dumps(pair.sidecar, indent=2, ensure_ascii=False)
        write_text(pair.for_others.with_suffix(".json"), text + "\n")
    save_updates(pipeline, pair.trained, pair.magnitudes, pair.for_diffusers, pair.dtype)


def largest_error(pair: FilePair) -> float:
    """Read the files back; returns the largest relative error of a layer's update in them.

    Raises RunError when one does not hold what was to be in it, within the rounding of its precision.
    """
    largest = 0.0
    for path, read, expected in (
        (pair.for_others, partial(kohya_updates, layers_per_block=pair.layers_per_block), pair.plain),
        (pair.for_diffusers, diffusers_updates, pair.trained),
    ):
        largest = max(largest, check_updates(path, read(load_file(path), expected), expected, pair.dtype))
    check_magnitudes(pair.for_diffusers, pair.magnitudes)
    return largest
