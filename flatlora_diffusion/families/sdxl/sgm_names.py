"""Module names of SDXL's UNet in Stability's original format, by diffusers' module paths.

The original numbers blocks consecutively: a down block has `layers` layers and its downsampler, an up block one more.
"""

from __future__ import annotations

import re

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_path(module: str, layers: int) -> str:
    """Return the original path of a module of the UNet. Raises KeyError if the original has no such module."""
    return _OUTSIDE[module] if module in _OUTSIDE else original_block_path(module, layers)


def original_block_path(module: str, layers: int) -> str:
    """Return the original path of a module in a block: `input_blocks.4.1` for `down_blocks.1.attentions.0`.

    Raises KeyError for a module outside the blocks.
    """
    kind, *rest = module.split(".", 1)
    if kind == "mid_block":
        part, number, inner = rest[0].split(".", 2)
        index = 1 if part == "attentions" else 2 * int(number)
        return f"middle_block.{index}.{_inner(part, inner)}"
    match = re.fullmatch(r"(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", rest[0] if rest else "")
    if match is None or kind not in ("down_blocks", "up_blocks"):
        raise KeyError(f"{module} has no original name")
    block, part, index, inner = int(match[1]), match[2], int(match[3]), match[4]
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
