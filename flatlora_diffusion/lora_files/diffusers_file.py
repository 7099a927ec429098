"""The LoRA as a file for diffusers: scale folded into B, so that no reader needs it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from flatlora_diffusion.adapter.delta import Update, Updates, balanced
from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.storage.atomic_io import atomic_write
from flatlora_diffusion.storage.run_dir import LORA_FILE


def peft_tensors(updates: Updates, dtype: torch.dtype) -> dict[str, Tensor]:
    """`lora_A` and `lora_B` of every layer with the scale in B.

    Layers of a lower rank are padded with zeros to their part's highest: older diffusers take one rank for all.
    """
    return dict(peft_stream(updates, dtype))


def peft_stream(updates: Updates, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """`peft_tensors` one layer after the other."""
    for part, layers in updates.items():
        rank = max(len(update.down) for update in layers.values())
        for module, update in layers.items():
            down, up = update.down, update.up * update.scale
            if dtype == torch.float16:
                down, up = balanced(down, up)
            missing = rank - len(down)
            # Pads are counted from the last axis: A's rank is its first, B's its second.
            down, up = (
                F.pad(down, (*[0, 0] * (down.ndim - 1), 0, missing)),
                F.pad(up, (*[0, 0] * (up.ndim - 2), 0, missing)),
            )
            yield f"{part}.{module}.lora_A.weight", down.to(dtype).contiguous()
            yield f"{part}.{module}.lora_B.weight", up.to(dtype).contiguous()


def magnitude_tensors(values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """DoRA's magnitudes, by module path, by part, in PEFT's names."""
    return {
        f"{part}.{module}.lora_magnitude_vector": value
        for part, layers in values.items()
        for module, value in layers.items()
    }


def save_updates(
    pipeline: Any, updates: Updates, magnitudes: Mapping[str, Mapping[str, Tensor]], path: Path, dtype: torch.dtype
) -> None:
    """Write what the pipeline's LoRA adds: A and sB of every layer in PEFT's names, and DoRA's magnitudes in fp32."""
    arguments: dict[str, Any] = {
        f"{part}_lora_adapter_metadata": _adapter_metadata(getattr(pipeline, part), layers, part in magnitudes)
        for part, layers in updates.items()
    }
    tensors = magnitude_tensors(magnitudes) | peft_tensors(updates, dtype)
    for part in updates:
        state = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        arguments[f"{part}_lora_layers"] = state
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as aside, tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        StableDiffusionXLPipeline.save_lora_weights(scratch, **arguments)
        (Path(scratch) / LORA_FILE).replace(aside)


def _adapter_metadata(model: nn.Module, layers: Mapping[str, Update], is_dora: bool) -> dict[str, Any]:
    """The fields of a LoraConfig with which diffusers restores `layers`: only those that every peft knows.

    Layers are named by their ends where these name no other layer, and otherwise by as much of their paths as all
    versions of transformers have.
    """
    paths = list(lora_layers(model))
    ends = sorted({_end(path) for path in paths})
    # While a LoRA is on, a layer's own name is that of its wrapper; what is inside has longer names.
    others = [name for name, _ in model.named_modules() if name.endswith(tuple(f".{end}" for end in ends))]
    rank = max(len(update.down) for update in layers.values())
    metadata: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ends if len(others) == len(paths) else [version_free(path) for path in paths],
    }
    return metadata | ({"use_dora": True} if is_dora else {})


def _end(path: str) -> str:
    """`to_q` or `to_out.0`: the shortest end of a path that is not a number alone."""
    head, _, last = path.rpartition(".")
    return f"{head.rpartition('.')[2]}.{last}" if last.isdigit() else last


def version_free(path: str) -> str:
    """As much of a text encoder's path as all versions of transformers have."""
    return path.removeprefix("text_model.").removeprefix("encoder.")
