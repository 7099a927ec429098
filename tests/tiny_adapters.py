"""Models of two layers with adapters that are no plain LoRA, and one fixed batch for each."""

from __future__ import annotations

import copy
from typing import Any

from lora_by_hand import lora_layers
from peft import LoraConfig, get_peft_model
from tiny_models import Case, normal, seeded
from torch import nn

from flatlora_diffusion.adapter.adalora import adalora_config
from flatlora_diffusion.adapter.full import start_full
from flatlora_diffusion.adapter.layers import ADAPTER
from flatlora_diffusion.config import AdapterConfig


def adalora_case() -> Case:
    """Two layers with AdaLoRA, of which one rank each was taken."""
    with seeded(1):
        base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5, bias=False))
        model = get_peft_model(base, adalora_config(4, 6.0, 0.0, ["0", "2"]))
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_E[ADAPTER])
            for side in (layer.lora_A, layer.lora_B):
                nn.init.normal_(side[ADAPTER])
            layer.lora_E[ADAPTER].data[2] = 0
    return Case(model, lambda one: one(normal(2, 3, 7, 6)), normal(3, 3, 7, 5))


def full_case() -> tuple[Case, nn.Sequential]:
    """A model of which dW is trained, and one that has it in its weights."""
    with seeded(1):
        plain: Any = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5, bias=False))
        model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]))
        start_full(model, model.peft_config[ADAPTER], AdapterConfig(adapter="full"), seed=0)
        for name, layer in lora_layers(model).items():
            change = layer.lora_B[ADAPTER].weight
            nn.init.normal_(change, std=0.3)
            plain.get_submodule(name).weight.data += change.detach()
    return Case(model, lambda one: one(normal(2, 3, 7, 6)), normal(3, 3, 7, 5)), plain
