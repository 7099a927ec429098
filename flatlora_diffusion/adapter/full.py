"""Full fine-tuning of the adapted layers, as a baseline: all of dW is trained in fp32, and W is never written.

    W' = W + dW,  a LoRA with A = I, frozen, and B = dW

So perturbation, checkpoints and previews work as for a LoRA, and weight decay pulls W' to W and not to 0. The results
are the merged pipeline, and an approximation by SVD as a LoRA of --rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import Tensor, nn

from flatlora_diffusion.adapter.layers import ADAPTER, base_weight, denoiser_of, lora_layers
from flatlora_diffusion.config import AdapterConfig


class _Identity(nn.Linear):
    """A = I without a multiplication; all layers of a width share its weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        return input


def start_full(model: nn.Module, lora: LoraConfig, config: AdapterConfig, seed: int) -> None:
    """Replace A by the identity and B by dW = 0 in each layer of the LoRA; `r` stays the rank of the file."""
    identities: dict[tuple[int, torch.device], nn.Parameter] = {}
    layers: Mapping[str, Any] = lora_layers(model)
    for layer in layers.values():
        width, device = layer.in_features, layer.lora_B[ADAPTER].weight.device
        key = width, device
        if key not in identities:
            identities[key] = nn.Parameter(torch.eye(width, device=device), requires_grad=False)
        delta = nn.Linear(width, layer.out_features, bias=False, device="meta")  # draws no weights
        delta.weight = nn.Parameter(torch.zeros(layer.out_features, width, device=device))
        layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = _Identity(identities[key]), delta
        layer.scaling[ADAPTER] = 1.0


def full_delta(layer: Any) -> Tensor | None:
    """dW of a layer, (m, n), fp32 on the CPU; None for a LoRA."""
    if not isinstance(layer.lora_A[ADAPTER], _Identity):
        return None
    delta: Tensor = layer.lora_B[ADAPTER].weight.detach().float().cpu()
    return delta


@torch.no_grad()
def save_merged(pipeline: Any, folder: Path) -> None:
    """Save the pipeline in diffusers' format, with W' in place of W in the dtype of W."""
    part = denoiser_of(pipeline)
    denoiser = getattr(pipeline, part)
    tensors = {
        name.replace(".base_layer.", "."): value
        for name, value in denoiser.state_dict().items()
        if ".lora_" not in name
    }
    layers: Mapping[str, Any] = lora_layers(denoiser)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        merged = base_weight(base).cpu() + layer.lora_B[ADAPTER].weight.float().cpu()
        tensors[f"{name}.weight"] = merged.to(base.weight.dtype)
    with init_empty_weights():  # the weights are assigned below
        merged_denoiser = type(denoiser).from_config(denoiser.config)
    merged_denoiser.load_state_dict(tensors, assign=True)
    type(pipeline)(**{**pipeline.components, part: merged_denoiser}).save_pretrained(folder)
