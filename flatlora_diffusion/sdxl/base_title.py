"""The name of a base in logs, summaries and pages; needs neither torch nor weights."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.config import TINY, ModelConfig
from flatlora_diffusion.sdxl.shapes import base_path, known_sizes

TINY_TITLE = "the tiny demo base"
REMEDY = "give --pretrained_model_name_or_path for SDXL"


def is_tiny(model: ModelConfig) -> bool:
    """Whether the base is the one that ships with this program, by name or by folder."""
    name = model.pretrained_model_name_or_path
    return name == TINY or Path(name).resolve() == Path(base_path(TINY)).resolve()


def base_title(model: ModelConfig) -> str:
    """Return `the tiny demo base, 64 pixels`, or another base's name or path with its native image size if known."""
    name = TINY_TITLE if is_tiny(model) else model.pretrained_model_name_or_path
    sizes = known_sizes(model)
    return name if sizes is None else title_with_size(name, sizes.native)


def title_with_size(name: str, pixels: int) -> str:
    """Return a base's name with its native image size."""
    return f"{name}, {pixels} pixels"


def base_line(model: ModelConfig) -> str:
    """Return `base: ` and the title; for the tiny base also the flag that selects another."""
    return f"base: {base_title(model)}" + (f"; {REMEDY}" if is_tiny(model) else "")
