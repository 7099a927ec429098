"""What people call a base: the first line of a log, a summary or a page; neither torch nor its weights are needed."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.config import TINY, ModelConfig
from flatlora_diffusion.sdxl.shapes import base_path, known_sizes

TINY_TITLE = "the tiny demo base"
REMEDY = "give --pretrained_model_name_or_path for SDXL"


def is_tiny(model: ModelConfig) -> bool:
    """Whether it is the small base that ships with this program, by its name or by its folder."""
    name = model.pretrained_model_name_or_path
    return name == TINY or Path(name).resolve() == Path(base_path(TINY)).resolve()


def base_title(model: ModelConfig) -> str:
    """`the tiny demo base, 64 pixels`; of another base the name or path, with its own image size where that is known.

    For a page; `base_line` is for a command line.
    """
    name = TINY_TITLE if is_tiny(model) else model.pretrained_model_name_or_path
    sizes = known_sizes(model)
    return name if sizes is None else sized(name, sizes.own)


def sized(name: str, pixels: int) -> str:
    """A base's name with its own image size."""
    return f"{name}, {pixels} pixels"


def base_line(model: ModelConfig) -> str:
    """`base: ` and the title, for the tiny base with the flag that gives another one."""
    return f"base: {base_title(model)}" + (f"; {REMEDY}" if is_tiny(model) else "")
