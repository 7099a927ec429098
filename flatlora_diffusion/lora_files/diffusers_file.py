"""Writes the LoRA file for diffusers, with the scale folded into B so that no reader needs it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.adapter.delta import Update, Updates, balanced, padded
from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.storage.atomic_io import atomic_write
from flatlora_diffusion.storage.run_dir import LORA_FILE


def peft_tensors(updates: Updates, dtype: torch.dtype) -> dict[str, Tensor]:
    """Collect `iter_peft_tensors` by name."""
    return dict(iter_peft_tensors(updates, dtype))


def iter_peft_tensors(updates: Updates, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield `lora_A` and `lora_B` of every layer in PEFT's names, with the scale folded into B.

    Layers of a lower rank are zero-padded to the highest rank of their part: older diffusers assume a single rank.
    """
    for part, layers in updates.items():
        rank = max(len(update.down) for update in layers.values())
        for module, update in layers.items():
            down, up = update.down, update.up * update.scale
            if dtype == torch.float16:
                down, up = balanced(down, up)
            down, up, _ = padded(Update(down, up, 1.0), rank)
            yield f"{part}.{module}.lora_A.weight", down.to(dtype).contiguous()
            yield f"{part}.{module}.lora_B.weight", up.to(dtype).contiguous()


def magnitude_tensors(values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name DoRA's magnitudes, given by part and module path, as PEFT does."""
    return {
        f"{part}.{module}.lora_magnitude_vector": value
        for part, layers in values.items()
        for module, value in layers.items()
    }


def save_diffusers_file(
    pipeline: Any, updates: Updates, magnitudes: Mapping[str, Mapping[str, Tensor]], path: Path, dtype: torch.dtype
) -> None:
    """Write the pipeline's LoRA: A and sB of every layer in PEFT's names, and DoRA's magnitudes in fp32."""
    arguments: dict[str, Any] = {
        f"{part}_lora_adapter_metadata": _adapter_metadata(getattr(pipeline, part), layers, part in magnitudes)
        for part, layers in updates.items()
    }
    tensors = magnitude_tensors(magnitudes) | peft_tensors(updates, dtype)
    for part in updates:
        state = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        arguments[f"{part}_lora_layers"] = state
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        type(pipeline).save_lora_weights(scratch, **arguments)
        (Path(scratch) / LORA_FILE).replace(temporary)


def _adapter_metadata(model: nn.Module, layers: Mapping[str, Update], is_dora: bool) -> dict[str, Any]:
    """The LoraConfig fields that diffusers needs to restore `layers`, limited to fields known to every peft.

    Target modules are the shortest suffixes if these match no other layer, else paths valid for all transformers.
    """
    paths = list(lora_layers(model))
    ends = sorted({_end(path) for path in paths})
    # With a LoRA attached the layer's path names PEFT's wrapper; the modules inside have longer paths.
    others = [name for name, _ in model.named_modules() if name.endswith(tuple(f".{end}" for end in ends))]
    rank = max(len(update.down) for update in layers.values())
    metadata: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ends if len(others) == len(paths) else [portable_module_path(path) for path in paths],
    }
    return metadata | ({"use_dora": True} if is_dora else {})


def _end(path: str) -> str:
    """The shortest suffix of a path that is not a bare number, such as `to_q` or `to_out.0`."""
    head, _, last = path.rpartition(".")
    return f"{head.rpartition('.')[2]}.{last}" if last.isdigit() else last


def portable_module_path(path: str) -> str:
    """The part of a text encoder's module path that all versions of transformers share."""
    return path.removeprefix("text_model.").removeprefix("encoder.")
