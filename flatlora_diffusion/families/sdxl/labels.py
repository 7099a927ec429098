"""The names of a base in LoRA files: SDXL, or the tiny base of this program."""

from __future__ import annotations

import json
from typing import Any

from flatlora_diffusion.config import INCLUDED_BASES, TINY
from flatlora_diffusion.families.labels import Labels

SDXL_LABELS = Labels("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "SDXL")
TINY_LABELS = Labels(
    "the tiny base of flatlora-diffusion", "flatlora_tiny", "flatlora-diffusion-tiny/lora", "Unknown", is_demo=True
)
_SIZES = ("block_out_channels", "cross_attention_dim", "addition_time_embed_dim")


def labels_of(unet: Any) -> Labels:
    """Return the labels of a base by the sizes of its UNet."""
    file = INCLUDED_BASES[TINY] / "unet" / "config.json"
    if not file.is_file():  # the package alone, without the samples
        return SDXL_LABELS
    tiny = json.loads(file.read_text(encoding="utf-8"))
    same = all(_plain(unet.config[name]) == _plain(tiny[name]) for name in _SIZES)
    return TINY_LABELS if same else SDXL_LABELS


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
