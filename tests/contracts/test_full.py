"""Full fine-tuning as a LoRA with A = I: its gradient is dL/dW, at W' + eps, and W keeps its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_by_hand import all_noise, lora_layers
from tiny_adapters import full_case
from torch import nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.adapter.layers import ADAPTER
from flatlora_diffusion.config import DrawKind


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
