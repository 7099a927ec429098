"""Full fine-tuning of the adapted layers, for comparison: all of dW is trained, in fp32, and W is never written.

    W' = W + dW,  which is a LoRA with A = I, frozen, and B = dW

So the perturbation, checkpoints and previews are those of a LoRA, and weight decay pulls W' to W and not to 0. What is
shared is the merged pipeline, and a LoRA of --rank by SVD, which misses some of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import Tensor, nn

from flatlora_diffusion.adapter.layers import ADAPTER, base_weight, lora_layers
from flatlora_diffusion.config import AdapterConfig


class _Same(nn.Linear):
    """A = I, which is not multiplied by; its weight is one for all layers of a width."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        return input


def start_full(model: nn.Module, lora: LoraConfig, config: AdapterConfig, seed: int) -> None:
    """Let each layer of the LoRA learn all of dW, from 0; `r` stays the rank of the file."""
    same: dict[tuple[int, torch.device], nn.Parameter] = {}
    layers: Mapping[str, Any] = lora_layers(model)
    for layer in layers.values():
        old = layer.lora_B[ADAPTER].weight
        width = layer.in_features
        key = width, old.device
        if key not in same:
            same[key] = nn.Parameter(torch.eye(width, device=old.device), requires_grad=False)
        whole = nn.Linear(width, layer.out_features, bias=False, device="meta")  # where it draws no weights
        whole.weight = nn.Parameter(torch.zeros(layer.out_features, width, device=old.device))
        layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = _Same(same[key]), whole
        layer.scaling[ADAPTER] = 1.0


def is_whole(layer: Any) -> bool:
    """Whether all of a layer's dW is trained."""
    return isinstance(layer.lora_A[ADAPTER], _Same)


def whole_change(layer: Any) -> Tensor | None:
    """dW of a layer, (m, n), fp32 on the CPU; None for a LoRA."""
    if not is_whole(layer):
        return None
    change: Tensor = layer.lora_B[ADAPTER].weight.detach().float().cpu()
    return change


@torch.no_grad()
def save_merged(pipeline: Any, folder: Path) -> None:
    """Write the pipeline with W' in place of W, in the dtype of W, as diffusers loads it."""
    unet = pipeline.unet
    tensors = {
        name.replace(".base_layer.", "."): value for name, value in unet.state_dict().items() if ".lora_" not in name
    }
    layers: Mapping[str, Any] = lora_layers(unet)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        merged = base_weight(base).cpu() + layer.lora_B[ADAPTER].weight.float().cpu()
        tensors[f"{name}.weight"] = merged.to(base.weight.dtype)
    with init_empty_weights():  # its own first weights would only be thrown away
        whole = type(unet).from_config(unet.config)
    whole.load_state_dict(tensors, assign=True)
    type(pipeline)(**{**pipeline.components, "unet": whole}).save_pretrained(folder)
