"""dL/dW is a product of what the layer computes with, in its dtype, added up in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers
from peft import get_peft_model
from tiny_models import Adapter, Case, normal, randomize_adapters, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora_diffusion.method.rivals.weight_gradients import WeightGradientHook, WeightGradients


def case(dtype: torch.dtype = torch.float32) -> Case:
    """A linear layer and a convolution, each behind a norm, whose output autocast leaves in fp32."""
    with seeded(0):
        layers = [nn.LayerNorm(24), nn.Linear(24, 32), nn.Unflatten(1, (2, 4, 4)), nn.GroupNorm(1, 2)]
        base = nn.Sequential(*layers, nn.Conv2d(2, 3, 3, padding=1), nn.Flatten())
        model = get_peft_model(base, Adapter().config(("1", "4")), autocast_adapter_dtype=False)
    randomize_adapters(model)
    model.to(dtype)
    inputs = normal(1, 64, 24)
    return Case(model, lambda module: module(inputs.to(dtype)), normal(2, 64, 48))


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_gradient_is_the_product_of_rounded_factors_summed_in_fp32(compute: torch.dtype) -> None:
    """Rounded once more, as a product in half precision would be, it were 1e-3 away."""
    toy = case()
    seen: dict[str, list[Tensor]] = {}
    for name, layer in lora_layers(toy.model).items():
        layer.get_base_layer().register_forward_hook(lambda _, given, made, name=name: keep(seen, name, given, made))
    hook = WeightGradientHook([toy.model])
    with hook.recording(WeightGradients()) as gradients:
        with torch.autocast("cpu", compute):
            prediction = toy.predict(toy.model)
        nn.functional.mse_loss(prediction.float(), toy.target).backward()
    for layer, slope in gradients.items():
        x, grad = (tensor.to(compute).double() for tensor in seen[layer.name])
        if layer.convolution is None:
            expected = grad.mT @ x
        else:
            expected = torch.nn.grad.conv2d_weight(x, layer.shape, grad, padding=1)
        assert slope.dtype == torch.float32
        torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def keep(seen: dict[str, list[Tensor]], name: str, given: tuple[Tensor], made: Tensor) -> None:
    seen[name] = [given[0].detach()]
    made.register_hook(lambda grad: seen[name].append(grad))


class Products(TorchDispatchMode):
    """The dtypes of the factors of each matrix product with an output in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm and made.dtype == torch.float32:
            self.seen.append(args[0].dtype)
        return made


@pytest.mark.skipif(not hasattr(torch.ops.aten.mm, "dtype"), reason="PyTorch before 2.8 has no such product")
def test_a_gpu_computes_no_fp32_product_for_the_weight_gradient() -> None:
    """On `meta`, which has the products of a GPU; a CPU has none with an output in another dtype."""
    toy = case(torch.bfloat16)
    model = toy.model.to("meta")
    hook, products = WeightGradientHook([model]), Products()
    with hook.recording(WeightGradients()) as gradients, products:
        model(torch.empty(64, 24, device="meta", dtype=torch.bfloat16)).sum().backward()
    assert {slope.dtype for slope in gradients.values()} == {torch.float32}
    assert products.seen == [torch.bfloat16]
