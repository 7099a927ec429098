"""The base weights are never written: bit-identical after use and after an exception."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lora_by_hand import lora_layers
from tiny_models import DENOISERS, Adapter, Case, toy_case
from torch import Tensor, nn

from flatlora_diffusion import FlatLora

pytestmark = pytest.mark.usefixtures("draw")


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if not p.requires_grad}


def snapshot(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Value and write counter of every frozen parameter and buffer; the counter shows a write that was undone, too."""
    held = {**frozen(model), **dict(model.named_buffers())}
    return {name: (tensor.detach().clone(), tensor._version) for name, tensor in held.items()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[Tensor, int]]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (value, version) in before.items():
        assert torch.equal(after[name][0], value), name
        assert after[name][1] == version, f"{name} was written"


def train(case: Case, flat: FlatLora, steps: int) -> None:
    optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=1.0)
    for step in range(steps):
        with flat.perturb(step=step):
            case.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.long) for dtype in (torch.float32, torch.float16))],
    ids=str,
)
def test_base_weights_are_bit_identical_after_100_perturbed_steps(dtype: torch.dtype) -> None:
    case = toy_case(Adapter(dtype=dtype))
    before = snapshot(case.model)
    lora_before = [p.detach().clone() for p in case.model.parameters() if p.requires_grad]
    train(case, FlatLora(case.model, sigma=0.1, total_steps=50), steps=100)
    assert_untouched(case.model, before)
    lora_after = [p for p in case.model.parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(lora_before, lora_after, strict=True)), "a LoRA was not trained"


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize(
    ("dtype", "dora"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)], ids=str
)
def test_base_weights_of_a_denoiser_are_bit_identical(denoiser: str, dtype: torch.dtype, dora: bool) -> None:
    case = DENOISERS[denoiser](Adapter(dtype=dtype, dora=dora))
    before = snapshot(case.model)
    train(case, FlatLora(case.model, schedule="constant"), steps=3)
    assert_untouched(case.model, before)


def test_autocast_leaves_the_base_weights_bit_identical() -> None:
    case = toy_case()
    before = snapshot(case.model)
    flat = FlatLora(case.model, schedule="constant")
    with flat.perturb(step=0):
        with torch.autocast("cpu", torch.bfloat16):
            loss = case.loss()
        loss.backward()
    assert_untouched(case.model, before)


@pytest.mark.parametrize("module", ["odd", "narrow"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_exception_inside_perturb_leaves_base_weights_and_forward_as_they_were(module: str, moment: str) -> None:
    """The exception comes out of the middle of a forward, next to an adapted layer."""
    case = toy_case()
    with torch.no_grad():
        clean = case.predict(case.model)
    before = snapshot(case.model)
    flat = FlatLora(case.model, schedule="constant")
    layer = lora_layers(case.model)[module]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    attach: Callable[..., torch.utils.hooks.RemovableHandle]
    attach = layer.register_forward_pre_hook if moment == "before" else layer.register_forward_hook
    hook = attach(stop)
    with pytest.raises(KeyboardInterrupt), flat.perturb(step=0):
        case.loss()
    hook.remove()
    assert_untouched(case.model, before)
    with torch.no_grad():
        assert torch.equal(case.predict(case.model), clean)
        with flat.perturb(step=0):
            assert not torch.equal(case.predict(case.model), clean), "perturb no longer works after an exception"


def test_an_exception_in_backward_leaves_the_base_weights() -> None:
    case = toy_case()
    before = snapshot(case.model)
    flat = FlatLora(case.model, schedule="constant")

    def stop(gradient: Tensor) -> Tensor:
        raise FloatingPointError

    def backward() -> None:
        loss = case.loss()
        case_hook = lora_layers(case.model)["tall"].lora_B["default"].weight.register_hook(stop)
        try:
            loss.backward()
        finally:
            case_hook.remove()

    with pytest.raises(FloatingPointError), flat.perturb(step=0):
        backward()
    assert_untouched(case.model, before)


@pytest.mark.long
def test_adding_and_subtracting_the_noise_drifts_where_perturb_does_not() -> None:
    """Why W is never written: 100 steps of W += eps; W -= eps move a bf16 weight by more than 0.1 % of its norm."""
    case = toy_case(Adapter(dtype=torch.bfloat16))
    flat = FlatLora(case.model, schedule="constant")
    weights = {name: layer.get_base_layer().weight for name, layer in lora_layers(case.model).items()}
    naive = {name: weight.detach().clone() for name, weight in weights.items()}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    for step in range(100):
        for name, weight in naive.items():
            noise = flat.noise(name, step=step).to(weight)
            weight += noise
            weight -= noise
        with flat.perturb(step=step):
            case.loss().backward()
    for name, weight in weights.items():
        assert torch.equal(weight, start[name])
        drift = (naive[name].float() - start[name].float()).norm() / start[name].float().norm()
        assert drift > 1e-3, name
