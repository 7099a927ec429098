"""The LoRA in kohya's names for SDXL's own block numbering: the one layout that every tool reads in full.

Names are derived by rule from the module paths, which are those of any UNet with SDXL's blocks. Each module has
exactly `lora_down.weight`, `lora_up.weight` and `alpha`; what it adds is alpha / rank * up @ down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.adapter.delta import LazyLayers, Update, Updates, balanced
from flatlora_diffusion.adapter.lora import TEXT_ATTENTION
from flatlora_diffusion.sdxl.sgm_names import original_block_path

KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# Layers whose names and shapes tell other tools the base: InvokeAI looks for any cross attention's keys, Draw Things
# for these in the second down block, and it takes a LoRA without the middle block for one of SSD-1B.
_TELLING = tuple(f"{block}.attentions.0.transformer_blocks.0.attn2.to_k" for block in ("down_blocks.1", "mid_block"))
# Alphas that fp16 and bf16 hold without loss of range.
_ALPHAS = (2.0**-8, 2.0**15)


def kohya_name(part: str, module: str, layers_per_block: int = 2) -> str:
    """The name of a module, such as `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q`.

    Raises KeyError for a module of the UNet that has no such name (conv_in, time_embedding, ...).
    """
    path = original_block_path(module, layers_per_block) if part == "unet" else module
    return f"{KOHYA_PREFIXES[part]}_{path.replace('.', '_')}"


def kohya_stream(
    updates: Updates, layers_per_block: int = 2, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """`lora_down.weight`, `lora_up.weight` and `alpha` (a 0-dim tensor) of every module, all in `dtype`, by name.

    One alpha per part, the commonest s * r: diffusers gives the commonest to all. Where a layer has another, the
    difference is in its `lora_up`. Rank 1 gets a row of zeros: stable-diffusion.cpp reads another rank from it.
    """
    alphas = {part: _common_alpha(layers, dtype) for part, layers in updates.items()}
    places = {
        kohya_name(part, module, layers_per_block): (part, module)
        for part, layers in updates.items()
        for module in layers
    }
    for name, (part, module) in sorted(places.items(), key=lambda item: f"{item[0]}."):
        update = _of_rank_2(updates[part][module])
        down, up = update.down, update.up * (update.scale * len(update.down) / float(alphas[part]))
        if dtype == torch.float16:
            down, up = balanced(down, up)
        yield f"{name}.alpha", alphas[part].clone()
        yield f"{name}.lora_down.weight", down.to(dtype).contiguous()
        yield f"{name}.lora_up.weight", up.to(dtype).contiguous()


def completed(updates: Updates, unet: nn.Module) -> Updates:
    """`updates` with the layers that other tools need to be there; what is added changes nothing, its factors are 0.

    AUTOMATIC1111 leaves a layer of the second text encoder as it is unless q, k, v and out are all in the file.
    InvokeAI and Draw Things tell SDXL from other bases by certain layers, which a LoRA on some blocks or on text
    encoders alone may lack.
    """
    whole = dict(updates)
    second = whole.get("text_encoder_2", {})
    partners: dict[str, Update] = {}
    for module in second:
        group, _, leaf = module.rpartition(".")
        for missing in TEXT_ATTENTION if leaf in TEXT_ATTENTION else ():
            if f"{group}.{missing}" not in second and f"{group}.{missing}" not in partners:
                update = second[module]
                partners[f"{group}.{missing}"] = _nothing(update.down, update.up, update.scale)
    if partners:
        whole["text_encoder_2"] = _with(second, partners)
    layers = whole.get("unet", {})
    telling = {module: _weight_shape(unet, module) for module in _TELLING if module not in layers}
    added = {module: shape for module, shape in telling.items() if shape is not None}
    if whole and added:
        patterns = [layers] if layers else list(whole.values())
        sizes = Counter((len(update.down), update.scale) for part in patterns for update in part.values())
        rank, scale = sizes.most_common(1)[0][0]
        nothing = {
            module: _nothing(torch.empty(rank, wide), torch.empty(out, rank), scale)
            for module, (out, wide) in added.items()
        }
        whole["unet"] = _with(layers, nothing)
    return whole


def _with(layers: Mapping[str, Update], more: Mapping[str, Update]) -> Mapping[str, Update]:
    return LazyLayers([*layers, *more], lambda module: more[module] if module in more else layers[module])


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


def _common_alpha(layers: Mapping[str, Update], dtype: torch.dtype) -> Tensor:
    common = Counter(update.scale * max(len(update.down), 2) for update in layers.values()).most_common(1)[0][0]
    return torch.tensor(min(max(common, _ALPHAS[0]), _ALPHAS[1]), dtype=dtype)
