"""Perturbed layers copy no weights or activations, also in channels_last, where a model trains as otherwise."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers
from tiny_models import CASES, Adapter, loss_and_gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora_diffusion import FlatLora

LAST = torch.channels_last
COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class LargeCopies(TorchDispatchMode):
    """Counts copies of at least `size` numbers, such as those of casts and of `contiguous`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output: Tensor = func(*args, **(kwargs or {}))
        self.count += func in COPIES and output.numel() >= self.size
        return output


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_low_rank_step_copies_no_more_large_tensors_than_plain_lora(autocast: bool) -> None:
    case = CASES["unet_conv"](Adapter())
    smallest = min(layer.get_base_layer().weight.numel() for layer in lora_layers(case.model).values())
    flat = FlatLora(case.model, sigma=0.1, schedule="constant", draw="low_rank")
    counts = []
    for perturbed in (nullcontext(), flat.perturb(0)):
        precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with perturbed, precision, LargeCopies(smallest) as copies:
            loss_and_gradients(case)
        counts.append(copies.count)
    plain, low_rank = counts
    # In fp32 the factors of all layers are cast once: U and V.
    assert low_rank < plain if autocast else low_rank == plain + 2
    assert plain > 10, "copies are counted"


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
