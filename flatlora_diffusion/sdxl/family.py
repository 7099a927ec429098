"""The names of a base in LoRA files: SDXL, or the tiny base of this program."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from flatlora_diffusion.config import SAMPLES


class Family(NamedTuple):
    """A base's name in messages, `ss_base_model_version`, `modelspec.architecture` and a sidecar file."""

    name: str
    version: str
    architecture: str
    sidecar: str


SDXL_FAMILY = Family("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "SDXL")
TINY_FAMILY = Family("the tiny base of flatlora-diffusion", "flatlora_tiny", "flatlora-diffusion-tiny/lora", "Unknown")
_SIZES = ("block_out_channels", "cross_attention_dim", "addition_time_embed_dim")


def family_of(unet: Any) -> Family:
    """Return the family of a base by the sizes of its UNet."""
    file = SAMPLES / "tiny_sdxl" / "unet" / "config.json"
    if not file.is_file():  # the package alone, without the samples
        return SDXL_FAMILY
    tiny = json.loads(file.read_text(encoding="utf-8"))
    same = all(_plain(unet.config[name]) == _plain(tiny[name]) for name in _SIZES)
    return TINY_FAMILY if same else SDXL_FAMILY


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
