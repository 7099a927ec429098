"""The LoRA in kohya's names for SDXL's own block numbering: the one layout that every tool reads in full.

Names are derived by rule from the module paths, which are those of any UNet with SDXL's blocks. Each module has
exactly `lora_down.weight`, `lora_up.weight` and `alpha`; what it adds is alpha / rank * up @ down.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.adapter import TEXT_ATTENTION
from flatlora_diffusion.lora_update import Update, Updates, balanced

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# Layers whose names and shapes tell other tools the base: InvokeAI looks for any cross attention's keys, Draw Things
# for these in the second down block, and it takes a LoRA without the middle block for one of SSD-1B.
_TELLING = tuple(f"{block}.attentions.0.transformer_blocks.0.attn2.to_k" for block in ("down_blocks.1", "mid_block"))
# Alphas that fp16 and bf16 hold without loss of range.
_ALPHAS = (2.0**-8, 2.0**15)


def kohya_name(part: str, module: str, layers_per_block: int = 2) -> str:
    """The name of a module, such as `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`.

    Raises KeyError for a module of the UNet that has no such name (conv_in, time_embedding, ...).
    """
    path = sgm_path(module, layers_per_block) if part == "unet" else module
    return f"{_PREFIXES[part]}_{path.replace('.', '_')}"


def sgm_path(module: str, layers: int) -> str:
    """`down_blocks.1.attentions.0.proj_in` as `input_blocks.4.1.proj_in`, and so on.

    Raises KeyError for a module of the UNet outside the blocks.
    """
    kind, *rest = module.split(".", 1)
    if kind == "mid_block":
        part, number, inner = rest[0].split(".", 2)
        place = 1 if part == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_inner(part, inner)}"
    found = re.fullmatch(r"(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", rest[0] if rest else "")
    if found is None or kind not in ("down_blocks", "up_blocks"):
        raise KeyError(f"{module} has no name that other tools know")
    block, part, index, inner = int(found[1]), found[2], int(found[3]), found[4]
    if kind == "down_blocks":
        first = (layers + 1) * block + 1
        if part == "downsamplers":
            return f"input_blocks.{first + layers}.0.op"
        return f"input_blocks.{first + index}.{int(part == 'attentions')}.{_inner(part, inner)}"
    first = (layers + 1) * block
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.2.{inner}"
    return f"output_blocks.{first + index}.{int(part == 'attentions')}.{_inner(part, inner)}"


def kohya_tensors(
    updates: Updates, layers_per_block: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`lora_down.weight`, `lora_up.weight` and `alpha` (a 0-dim tensor) of every module, all in `dtype`.

    One alpha per part, the commonest s * r: diffusers gives the commonest to all. Where a layer has another, the
    difference is in its `lora_up`. Rank 1 gets a row of zeros: stable-diffusion.cpp reads another rank from it.
    """
    tensors: dict[str, Tensor] = {}
    for part, layers in updates.items():
        wide = {module: _of_rank_2(update) for module, update in layers.items()}
        alpha = _alpha(wide, dtype)
        for module, update in wide.items():
            down, up = update.down, update.up * (update.scale * len(update.down) / float(alpha))
            if dtype == torch.float16:
                down, up = balanced(down, up)
            name = kohya_name(part, module, layers_per_block)
            tensors[f"{name}.lora_down.weight"] = down.to(dtype).contiguous()
            tensors[f"{name}.lora_up.weight"] = up.to(dtype).contiguous()
            tensors[f"{name}.alpha"] = alpha.clone()
    return tensors


def completed(updates: Updates, unet: nn.Module) -> Updates:
    """`updates` with the layers that other tools need to be there; what is added changes nothing, its factors are 0.

    AUTOMATIC1111 leaves a layer of the second text encoder as it is unless q, k, v and out are all in the file.
    InvokeAI and Draw Things tell SDXL from other bases by certain layers, which a LoRA on some blocks or on text
    encoders alone may lack.
    """
    whole = {part: dict(layers) for part, layers in updates.items()}
    second = whole.get("text_encoder_2", {})
    for module, update in list(second.items()):
        group, _, leaf = module.rpartition(".")
        if leaf in TEXT_ATTENTION:
            for missing in TEXT_ATTENTION:
                second.setdefault(f"{group}.{missing}", _nothing(update.down, update.up, update.scale))
    layers = whole.get("unet", {})
    telling = {module: _weight_shape(unet, module) for module in _TELLING if module not in layers}
    added = {module: shape for module, shape in telling.items() if shape is not None}
    if whole and added:
        patterns = layers.values() or [update for part in whole.values() for update in part.values()]
        rank, scale = Counter((len(update.down), update.scale) for update in patterns).most_common(1)[0][0]
        whole["unet"] = layers | {
            module: _nothing(torch.empty(rank, wide), torch.empty(out, rank), scale)
            for module, (out, wide) in added.items()
        }
    return whole


def _nothing(down: Tensor, up: Tensor, scale: float) -> Update:
    return Update(torch.zeros_like(down), torch.zeros_like(up), scale)


def _weight_shape(unet: nn.Module, module: str) -> tuple[int, int] | None:
    """(out, in) of a Linear, None where the UNet has no such layer."""
    layer: Any = dict(unet.named_modules()).get(module)
    return None if layer is None else (int(layer.out_features), int(layer.in_features))


def _of_rank_2(update: Update) -> Update:
    """`update` with at least rank 2; s stays, so its alpha s * r doubles with a rank of 1."""
    down, up, scale = update
    if len(down) > 1:
        return update
    return Update(torch.cat([down, torch.zeros_like(down)]), torch.cat([up, torch.zeros_like(up)], dim=1), scale)


def _alpha(layers: Mapping[str, Update], dtype: torch.dtype) -> Tensor:
    common = Counter(update.scale * len(update.down) for update in layers.values()).most_common(1)[0][0]
    return torch.tensor(min(max(common, _ALPHAS[0]), _ALPHAS[1]), dtype=dtype)


def _inner(part: str, inner: str) -> str:
    return _RESNET[inner] if part == "resnets" else inner
