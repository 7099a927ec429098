"""The names of a base in LoRA files: FLUX.2 klein, or the tiny klein of this program."""

from __future__ import annotations

import json
from typing import Any

from flatlora_diffusion.config import INCLUDED_BASES, TINY_KLEIN
from flatlora_diffusion.families.labels import Labels

_CODE = "https://github.com/black-forest-labs/flux2"


def _labels(name: str, version: str, architecture: str, is_demo: bool = False) -> Labels:
    return Labels(
        name,
        version,
        architecture,
        "Unknown",
        is_demo,
        is_flow=True,
        implementation=_CODE,
        tag="flux2-klein",
        programs="ComfyUI or another program for FLUX.2 klein",
    )


# As musubi-tuner writes them.
KLEIN_4B = _labels("FLUX.2 klein", "flux_2_klein_4b", "Flux.2-klein-4b/lora")
KLEIN_9B = _labels("FLUX.2 klein", "flux_2_klein_9b", "Flux.2-klein-9b/lora")
TINY_LABELS = _labels(
    "the tiny klein of flatlora-diffusion", "flatlora_tiny_klein", "flatlora-diffusion-tiny-klein/lora", is_demo=True
)
_SIZES = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
_WIDTH_4B = 3072


def labels_of(transformer: Any) -> Labels:
    """Return the labels of a base by the sizes of its transformer."""
    file = INCLUDED_BASES[TINY_KLEIN] / "transformer" / "config.json"
    config = transformer.config
    if file.is_file():  # not in the package alone, without the samples
        tiny = json.loads(file.read_text(encoding="utf-8"))
        if all(config[name] == tiny[name] for name in _SIZES):
            return TINY_LABELS
    return KLEIN_4B if config.num_attention_heads * config.attention_head_dim <= _WIDTH_4B else KLEIN_9B
