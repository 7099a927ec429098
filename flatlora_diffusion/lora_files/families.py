"""Recognizes LoRA files for other models than SDXL by the names and shapes in their headers."""

from __future__ import annotations

import re
from collections.abc import Mapping

_BY_NAME = (
    ("Flux", re.compile(r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]")),
    (
        "Stable Diffusion 3",
        re.compile(r"(^|[._])joint_blocks[._]|^lora_te3_|^text_encoder_3\.|[._]attn2?[._]add_[qkv]_proj"),
    ),
    (
        "a transformer model such as Wan, Qwen-Image or Z-Image",
        re.compile(r"^(transformer|diffusion_model\.(layers|(transformer_)?blocks))\."),
    ),
    (
        "Stable Diffusion 1 or 2",  # SDXL has three blocks in each direction and two text encoders
        re.compile(r"^lora_te_|(^|[._])(down_blocks|up_blocks)[._]3[._]|(^|[._])(input|output)_blocks[._](9|1\d)[._]"),
    ),
)
_CROSS_ATTENTION = re.compile(r"attn2[._](processor[._])?to_[kv]")
_BY_WIDTH = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the refiner of SDXL"}


def other_family(shapes: Mapping[str, tuple[int, ...]], width: int) -> str | None:
    """The model for which the file is, by name; None when nothing speaks against SDXL with text of `width`.

    `shapes` are those of the file's tensors; the width of the text is 2048 for SDXL.
    """
    for family, names in _BY_NAME:
        if any(names.search(name) for name in shapes):
            return family
    for name, shape in shapes.items():
        if len(shape) >= 2 and _CROSS_ATTENTION.search(name) and _is_down(name):
            family_by_width = None if shape[1] == width else _BY_WIDTH.get(shape[1])
            if family_by_width is not None:
                return family_by_width
    return None


def _is_down(name: str) -> bool:
    return "lora_A" in name or "down.weight" in name
