"""LoRA by the book, without the code under test: which layers there are, what W + sBA is, what W + eps gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion import FlatLora

WRAPPER_PREFIXES = ("base_model.model.", "module.", "_orig_mod.")


class WithoutFloat64(Tensor):
    """A tensor of a device that has no float64, such as MPS."""

    def double(self, *_: Any, **__: Any) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.as_subclass(Tensor)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Every PEFT LoRA layer by its module path without the wrappers' prefixes; found without the code under test."""
    return {clean_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def clean_name(name: str) -> str:
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def merged_weight(layer: Any) -> Tensor:
    """W + sum over active adapters of s B A in fp32, formed by hand; s = alpha / r, or alpha / sqrt(r) for rsLoRA."""
    weight = layer.get_base_layer().weight.detach().float().clone()
    for adapter in layer.active_adapters:
        rank = layer.r[adapter]
        scale = layer.lora_alpha[adapter] / (rank**0.5 if layer.use_rslora[adapter] else rank)
        down = layer.lora_A[adapter].weight.detach().float().flatten(1)
        up = layer.lora_B[adapter].weight.detach().float().flatten(1)
        weight += scale * (up @ down).view_as(weight)
    return weight


def add_to_base(model: nn.Module, noise: Mapping[str, Tensor]) -> nn.Module:
    """`model` itself after W += eps in every adapted layer: the reference that a perturbed run must equal."""
    layers = lora_layers(model)
    assert layers.keys() == noise.keys()
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.data
        assert noise[name].shape == weight.shape
        weight += noise[name].to(weight)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient, and no gradient left on the model."""
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def all_noise(flat: FlatLora, step: int, slot: int = 0) -> dict[str, Tensor]:
    return {name: flat.noise(name, step=step, slot=slot) for name in flat.layers}


def distance(result: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Relative distance of two sets of gradients, each taken as one long vector."""
    apart = sum((result[name].float() - expected[name].float()).square().sum() for name in expected)
    size = sum(gradient.float().square().sum() for gradient in expected.values())
    return float(torch.as_tensor(apart / size).sqrt())
