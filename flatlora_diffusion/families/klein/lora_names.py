"""The names of the transformer's layers in LoRA files.

Black Forest Labs' format fuses query, key and value of a double block into one layer; of a single block it has both
layers as diffusers has them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_DOUBLE = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.to_add_out": ("txt_attn.proj", None),
    "ff.linear_in": ("img_mlp.0", None),
    "ff.linear_out": ("img_mlp.2", None),
    "ff_context.linear_in": ("txt_mlp.0", None),
    "ff_context.linear_out": ("txt_mlp.2", None),
}
_SINGLE = {"attn.to_qkv_mlp_proj": ("linear1", None), "attn.to_out": ("linear2", None)}
# By diffusers' names. norm_out.linear is left out: its halves are in another order there.
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "proj_out": "final_layer.linear",
}
_FUSED = re.compile(r"double_blocks[._]\d+[._](img|txt)_attn[._]qkv$")
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


class OriginalLayer(NamedTuple):
    """A layer in the original format; `third` is the third of its rows that a layer of diffusers is, None for all."""

    path: str
    third: int | None


def original_layer(module: str) -> OriginalLayer:
    """Return the original layer of a module of the transformer. Raises KeyError if there is none."""
    match = _BLOCK.fullmatch(module)
    if match is None:
        return OriginalLayer(_OUTSIDE[module], None)
    single, number, inner = match.groups()
    path, third = (_SINGLE if single else _DOUBLE)[inner]
    return OriginalLayer(f"{'single' if single else 'double'}_blocks.{number}.{path}", third)


def file_names(module: str) -> dict[str, str]:
    """Return the styles of all names of a layer, by name.

    For a third of a fused layer the original names are those that `split_name` gives its thirds.
    """
    flat = module.replace(".", "_")
    names = {
        f"transformer.{module}": "peft",
        f"diffusion_model.{module}": "comfyui",
        f"lora_transformer_{flat}": "kohya-diffusers",
        f"lycoris_{flat}": "lycoris",
        module: "peft",
    }
    try:
        path, third = original_layer(module)
    except KeyError:
        return names
    end = "" if third is None else f".{third}"
    return {
        **names,
        f"lora_unet_{path.replace('.', '_')}{end}": "kohya-sgm",
        f"diffusion_model.{path}{end}": "comfyui",
        f"{path}{end}": "comfyui",
    }


def split_name(name: str) -> tuple[str, ...]:
    """Return the names of the layers that share the rows of a layer of a file; only `name` for most layers."""
    return tuple(f"{name}.{third}" for third in range(3)) if _FUSED.search(name) else (name,)
