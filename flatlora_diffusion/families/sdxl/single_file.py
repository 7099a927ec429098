"""Saving an SDXL pipeline as a single .safetensors file with Stability's original names, for ComfyUI and A1111.

The inverse of diffusers' single-file loader, independent of widths and depths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flatlora_diffusion.families.sdxl.sgm_names import original_path
from flatlora_diffusion.storage.atomic_io import atomic_write

Rules = Mapping[str, str | Callable[[re.Match[str]], str]]

# Prefixes of the tensor names of each part of a pipeline.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
_VAE: Rules = {
    r"\.down_blocks\.(\d)\.resnets\.": r".down.\1.block.",
    r"\.down_blocks\.(\d)\.downsamplers\.0\.": r".down.\1.downsample.",
    r"\.mid_block\.resnets\.(\d)\.": lambda m: f".mid.block_{int(m[1]) + 1}.",
    r"\.mid_block\.attentions\.0\.": ".mid.attn_1.",
    r"\.group_norm\.": ".norm.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.to_out\.0\.": ".proj_out.",
    r"\.conv_norm_out\.": ".norm_out.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
}
_OPEN_CLIP: Rules = {
    r"^text_model\.embeddings\.token_embedding": "token_embedding",
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"^text_model\.final_layer_norm": "ln_final",
    r"^text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"\.layer_norm(\d)\.": r".ln_\1.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
    r"\.self_attn\.": ".attn.",
}


def save_single_file(pipeline: Any, path: Path) -> Path:
    """Write UNet, VAE and both text encoders, each tensor in its dtype; returns the path."""
    unet = unet_tensors(pipeline.unet.state_dict(), pipeline.unet.config.layers_per_block)
    tensors = {
        **_prefixed(PREFIXES["unet"], unet),
        **_prefixed(PREFIXES["vae"], vae_tensors(pipeline.vae.state_dict())),
        **_prefixed(PREFIXES["text_encoder"], clip_tensors(pipeline.text_encoder.state_dict())),
        **_prefixed(PREFIXES["text_encoder_2"], open_clip_tensors(pipeline.text_encoder_2.state_dict())),
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt"})
    return path


def unet_tensors(state: Mapping[str, Tensor], layers_per_block: int = 2) -> dict[str, Tensor]:
    """Rename the tensors of the UNet."""
    tensors = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        tensors[f"{_original_path(module, layers_per_block)}.{kind}"] = tensor
    return tensors


def vae_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the VAE; attention becomes 1 x 1 convolutions, up blocks are numbered in reverse."""
    last = max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    up: Rules = {
        r"\.up_blocks\.(\d)\.resnets\.": lambda m: f".up.{last - int(m[1])}.block.",
        r"\.up_blocks\.(\d)\.upsamplers\.0\.": lambda m: f".up.{last - int(m[1])}.upsample.",
    }
    return {
        _renamed(name, {**_VAE, **up}): tensor[:, :, None, None]
        if ".attentions." in name and tensor.ndim == 2
        else tensor
        for name, tensor in state.items()
    }


def clip_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the first text encoder, which lack the prefix `text_model.` since transformers 5.6."""
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def open_clip_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the second text encoder to open_clip: q, k and v in one `in_proj`, and the projection transposed."""
    tensors = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)", name)
        if match is None:
            tensors[_renamed(name, _OPEN_CLIP)] = tensor
        elif match[2] == "q":
            rows = [state[f"{match[1]}.{part}_proj.{match[3]}"] for part in "qkv"]
            tensors[f"{_renamed(match[1] + '.', _OPEN_CLIP)}in_proj_{match[3]}"] = torch.cat(rows)
    tensors["text_projection"] = tensors.pop("text_projection.weight").T
    return tensors


def _original_path(module: str, layers: int) -> str:
    """Return the original path; unchanged if there is none, as for a distilled model's `cond_proj`."""
    try:
        return original_path(module, layers)
    except KeyError:
        return module


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name
