"""A model in channels_last trains as it does otherwise, and no perturbed layer makes its activations contiguous."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers
from tiny_models import CASES, Adapter, loss_and_gradients
from torch import nn

from flatlora_diffusion import FlatLora

LAST = torch.channels_last


@pytest.mark.parametrize("draw", ["full", "low_rank"])
def test_a_unet_in_channels_last_computes_the_same_and_stays_in_it(draw: str) -> None:
    case = CASES["unet_conv"](Adapter())
    last: Any = copy.deepcopy(case.model).to(memory_format=LAST)
    changed: list[str] = []

    def look(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        if inputs.is_contiguous(memory_format=LAST) and not output.is_contiguous(memory_format=LAST):
            changed.append(name)

    count = 0
    for name, layer in lora_layers(last).items():
        if isinstance(layer.get_base_layer(), nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output, name=name: look(name, inputs[0], output))
            count += 1
    usual, flat = (FlatLora(model, sigma=0.1, schedule="constant", draw=draw) for model in (case.model, last))
    with usual.perturb(0), flat.perturb(0):
        loss, gradients = loss_and_gradients(case)
        loss_last, gradients_last = loss_and_gradients(case, last)
    torch.testing.assert_close(loss_last, loss, rtol=1e-4, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_last[name], gradient, rtol=1e-3, atol=1e-5)
    assert count > 10
    assert not changed
