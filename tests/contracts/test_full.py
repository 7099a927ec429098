"""Full fine-tuning as a LoRA with A = I: its gradient is dL/dW, at W' + eps, and W keeps its bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_by_hand import all_noise, lora_layers
from peft import LoraConfig, get_peft_model
from tiny_models import Case, normal, seeded
from torch import nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.adapter.full import widen
from flatlora_diffusion.adapter.layers import ADAPTER
from flatlora_diffusion.config import DrawKind


def full_case() -> tuple[Case, nn.Sequential]:
    """A model of which dW is trained, and one that has it in its weights."""
    with seeded(1):
        plain = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5, bias=False))
        model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]))
        widen(model)
        for name, layer in lora_layers(model).items():
            change = layer.lora_B[ADAPTER].weight
            nn.init.normal_(change, std=0.3)
            weights_of(plain, name).weight.data += change.detach()
    return Case(model, lambda one: one(normal(2, 7, 6)), normal(3, 7, 5)), plain


def weights_of(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


@pytest.mark.parametrize("draw", ["full", "low_rank"])
def test_the_gradient_is_that_of_the_weights_at_w_plus_eps(draw: DrawKind) -> None:
    case, plain = full_case()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    flat = FlatLora(case.model, sigma=0.5, schedule="constant", seed=3, draw=draw)
    eps = all_noise(flat, step=1)
    with flat.perturb(1):
        case.loss().backward()
    for name, noise in eps.items():
        weight = weights_of(plain, name).weight
        torch.testing.assert_close(flat.filter_norms(name), weight.detach().norm(dim=1))
        weight.data += noise
    case.loss(plain).backward()
    for name, layer in lora_layers(case.model).items():
        torch.testing.assert_close(layer.lora_B[ADAPTER].weight.grad, weights_of(plain, name).weight.grad)
        assert layer.lora_A[ADAPTER].weight.grad is None
    flat.detach()
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
