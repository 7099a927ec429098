"""The LoRA in kohya's layout with SDXL's original block numbering, the only layout that every tool reads in full.

Names follow from the module paths of any UNet with SDXL's blocks. Each module has exactly `lora_down.weight`,
`lora_up.weight` and `alpha`; its update is alpha / rank * up @ down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.adapter.delta import LazyLayers, Update, Updates, balanced, padded
from flatlora_diffusion.adapter.lora import TEXT_ATTENTION
from flatlora_diffusion.families.sdxl.lora_names import KOHYA_PREFIXES as KOHYA_PREFIXES, kohya_name as kohya_name

# Layers by which other tools recognize SDXL: InvokeAI looks for cross-attention keys in any block, Draw Things for
# those in the second down block; without the middle block it takes the LoRA for SSD-1B.
_IDENTIFYING_LAYERS = tuple(
    f"{block}.attentions.0.transformer_blocks.0.attn2.to_k" for block in ("down_blocks.1", "mid_block")
)
_MIN_ALPHA, _MAX_ALPHA = 2.0**-8, 2.0**15  # fp16 and bf16 represent this range


def kohya_tensors(
    updates: Updates, layers_per_block: int = 2, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Yield `lora_down.weight`, `lora_up.weight` and `alpha` (0-dim) of every module in `dtype`, sorted by name."""
    # diffusers applies the most common alpha to all layers of a part, so there is one alpha per part, the most common
    # s * r; a layer with another s * r has the ratio in its `lora_up`.
    alphas = {part: _common_alpha(layers, dtype) for part, layers in updates.items()}
    places = {
        kohya_name(part, module, layers_per_block): (part, module)
        for part, layers in updates.items()
        for module in layers
    }
    for name, (part, module) in sorted(places.items(), key=lambda item: f"{item[0]}."):
        update = padded(updates[part][module], 2)  # stable-diffusion.cpp misreads rank 1
        down, up = update.down, update.up * (update.scale * len(update.down) / float(alphas[part]))
        if dtype == torch.float16:
            down, up = balanced(down, up)
        yield f"{name}.alpha", alphas[part].clone()
        yield f"{name}.lora_down.weight", down.to(dtype).contiguous()
        yield f"{name}.lora_up.weight", up.to(dtype).contiguous()


def with_required_layers(updates: Updates, unet: nn.Module) -> Updates:
    """Add the layers that other tools require in a file, with zero factors that change nothing.

    AUTOMATIC1111 ignores an attention layer of the second text encoder unless q, k, v and out are all in the file.
    InvokeAI and Draw Things recognize SDXL by certain layers, which a LoRA of few blocks or of text encoders may lack.
    """
    whole = dict(updates)
    second = whole.get("text_encoder_2", {})
    partners: dict[str, Update] = {}
    for module in second:
        group, _, leaf = module.rpartition(".")
        for missing in TEXT_ATTENTION if leaf in TEXT_ATTENTION else ():
            if f"{group}.{missing}" not in second and f"{group}.{missing}" not in partners:
                update = second[module]
                partners[f"{group}.{missing}"] = Update(
                    torch.zeros_like(update.down), torch.zeros_like(update.up), update.scale
                )
    if partners:
        whole["text_encoder_2"] = _merged_layers(second, partners)
    layers = whole.get("unet", {})
    missing_shapes = {module: _weight_shape(unet, module) for module in _IDENTIFYING_LAYERS if module not in layers}
    added = {module: shape for module, shape in missing_shapes.items() if shape is not None}
    if whole and added:
        patterns = [layers] if layers else list(whole.values())
        sizes = Counter((len(update.down), update.scale) for part in patterns for update in part.values())
        rank, scale = sizes.most_common(1)[0][0]
        zeros = {
            module: Update(torch.zeros(rank, width), torch.zeros(out, rank), scale)
            for module, (out, width) in added.items()
        }
        whole["unet"] = _merged_layers(layers, zeros)
    return whole


def _merged_layers(layers: Mapping[str, Update], more: Mapping[str, Update]) -> Mapping[str, Update]:
    return LazyLayers([*layers, *more], lambda module: more[module] if module in more else layers[module])


def _weight_shape(unet: nn.Module, module: str) -> tuple[int, int] | None:
    """(out, in) of a Linear; None if the UNet has no such layer."""
    layer: Any = dict(unet.named_modules()).get(module)
    return None if layer is None else (int(layer.out_features), int(layer.in_features))


def _common_alpha(layers: Mapping[str, Update], dtype: torch.dtype) -> Tensor:
    common = Counter(update.scale * max(len(update.down), 2) for update in layers.values()).most_common(1)[0][0]
    return torch.tensor(min(max(common, _MIN_ALPHA), _MAX_ALPHA), dtype=dtype)
