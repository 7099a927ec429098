"""The name of a base in logs, summaries and pages; needs neither torch nor weights."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.config import TINY, ModelConfig
from flatlora_diffusion.families.paths import base_path

TINY_TITLE = "the tiny demo base"
REMEDY = "give --pretrained_model_name_or_path for SDXL"


def is_tiny(model: ModelConfig) -> bool:
    """Whether the base is the one that ships with this program, by name or by folder."""
    name = model.pretrained_model_name_or_path
    return name == TINY or Path(name).resolve() == Path(base_path(TINY)).resolve()


def title_with_size(name: str, pixels: int) -> str:
    """Return a base's name with its native image size."""
    return f"{name}, {pixels} pixels"
