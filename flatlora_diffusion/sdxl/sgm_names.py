"""The names that SDXL's UNet has in Stability's own files and in tools that follow them, by diffusers' module paths.

Blocks are numbered through there: a down block has `layers` and its downsampler, an up block one layer more.
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
    """The original path of any module of the UNet. Raises KeyError for one that the original has not."""
    return _OUTSIDE[module] if module in _OUTSIDE else original_block_path(module, layers)


def original_block_path(module: str, layers: int) -> str:
    """`down_blocks.1.attentions.0.proj_in` as `input_blocks.4.1.proj_in`, and so on.

    Raises KeyError for a module of the UNet outside the blocks.
    """
    kind, *rest = module.split(".", 1)
    if kind == "mid_block":
        part, number, inner = rest[0].split(".", 2)
        place = 1 if part == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_inner(part, inner)}"
    match = re.fullmatch(r"(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", rest[0] if rest else "")
    if match is None or kind not in ("down_blocks", "up_blocks"):
        raise KeyError(f"{module} has no name that other tools know")
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
