"""The names that LoRA files have for their base: SDXL, or the tiny base, which no other program has."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from flatlora_diffusion.config import SAMPLES


class Family(NamedTuple):
    """A base's name in sentences, and in `ss_base_model_version`, `modelspec.architecture` and a sidecar."""

    name: str
    version: str
    architecture: str
    sidecar: str


SDXL_FAMILY = Family("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "SDXL")
TINY_FAMILY = Family("the tiny base of flatlora-diffusion", "flatlora_tiny", "flatlora-diffusion-tiny/lora", "Unknown")
_TELLING = ("block_out_channels", "cross_attention_dim", "addition_time_embed_dim")


def family_of(unet: Any) -> Family:
    """The family of a base, by the sizes of its UNet, wherever it lies and whatever it is called."""
    file = SAMPLES / "tiny_sdxl" / "unet" / "config.json"
    if not file.is_file():  # the package alone, without the samples
        return SDXL_FAMILY
    ours = json.loads(file.read_text(encoding="utf-8"))
    same = all(_plain(unet.config[name]) == _plain(ours[name]) for name in _TELLING)
    return TINY_FAMILY if same else SDXL_FAMILY


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
