"""The LoRA in kohya's names for SDXL's own block numbering: the one layout that every tool reads in full.

Names are derived by rule from the module paths, which are those of any UNet with SDXL's blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.lora_file import expected_tensors
from flatlora_diffusion.tensor_file import save_tensors

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def kohya_name(part: str, module: str, layers_per_block: int = 2) -> str:
    """The name of a module, such as `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`.

    Raises KeyError for a module of the UNet that has no such name (conv_in, time_embedding, ...).
    """
    path = _sgm_path(module, layers_per_block) if part == "unet" else module
    return f"{_PREFIXES[part]}_{path.replace('.', '_')}"


def kohya_tensors(tensors: Mapping[str, Tensor], layers_per_block: int = 2) -> dict[str, Tensor]:
    """`lora_down`, `lora_up` and `alpha` (the rank: the scale is in `lora_up`) of PEFT's A and B.

    Raises ValueError for DoRA, whose magnitudes no two tools read alike.
    """
    converted: dict[str, Tensor] = {}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if rest.endswith(".lora_magnitude_vector"):
            raise ValueError("DoRA has no kohya layout that other tools agree on")
        module, _, side = rest.removesuffix(".weight").rpartition(".")
        name = kohya_name(part, module, layers_per_block)
        if side == "lora_A":
            converted[f"{name}.lora_down.weight"] = value
            converted[f"{name}.alpha"] = torch.tensor(float(len(value)))
        else:
            converted[f"{name}.lora_up.weight"] = value
    return converted


def save_kohya(pipeline: Any, folder: Path) -> Path:
    """Write `pytorch_lora_weights_kohya.safetensors`; returns its path."""
    save_tensors(folder / KOHYA_FILE, kohya_tensors(expected_tensors(pipeline), pipeline.unet.config.layers_per_block))
    return folder / KOHYA_FILE


def _sgm_path(module: str, layers: int) -> str:
    """`down_blocks.1.attentions.0.proj_in` as `input_blocks.4.1.proj_in`, and so on."""
    kind, *rest = module.split(".", 1)
    if kind == "mid_block":
        part, number, inner = rest[0].split(".", 2)
        place = 1 if part == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_inner(part, inner)}"
    found = re.fullmatch(r"(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", rest[0] if rest else "")
    if found is None or kind not in ("down_blocks", "up_blocks"):
        raise KeyError(f"{module} has no name that other tools know")
    block, part, index, inner = int(found[1]), found[2], int(found[3]), found[4]
    if kind == "down_blocks":
        first = (layers + 1) * block + 1
        if part == "downsamplers":
            return f"input_blocks.{first + layers}.0.op"
        return f"input_blocks.{first + index}.{int(part == 'attentions')}.{_inner(part, inner)}"
    first = (layers + 1) * block
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.2.{inner}"
    return f"output_blocks.{first + index}.{int(part == 'attentions')}.{_inner(part, inner)}"


def _inner(part: str, inner: str) -> str:
    return _RESNET[inner] if part == "resnets" else inner
