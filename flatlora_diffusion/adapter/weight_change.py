"""How large the change of the weights is that a LoRA has learned, as something to be held down: ||W' - W||^2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.adapter.full import is_whole
from flatlora_diffusion.adapter.layers import ADAPTER, lora_layers
from flatlora_diffusion.method.branch import factors_of, scale_of, square_norm


def squared_change(model: nn.Module) -> Tensor:
    """The sum of ||W' - W||_F^2 over the layers, differentiable; of a LoRA without forming B A."""
    return torch.stack([_of_layer(layer) for layer in lora_layers(model).values()]).sum()


def _of_layer(layer: Any) -> Tensor:
    if is_whole(layer):
        whole: Tensor = layer.lora_B[ADAPTER].weight.square().sum()
        return whole
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]  # an anchor is one too
    pairs = [factors_of(layer, adapter) for adapter in adapters]
    down = torch.cat([first.flatten(1) for first, _ in pairs])
    up = torch.cat([up.flatten(1) * scale_of(layer, one) for (_, up), one in zip(pairs, adapters, strict=True)], dim=1)
    return square_norm(down, up)
