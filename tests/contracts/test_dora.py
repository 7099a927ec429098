"""DoRA: eps on W scaled by the row norms of W + sBA is Eq. 7 on the merged weight, whose rows have length m."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from draw_statistics import assert_unit_variance
from lora_by_hand import distance, gradients, lora_layers, merged_weight
from tiny_models import Adapter, Case, klein_case, loss_and_gradients, toy_case, unet_case
from torch import Tensor, nn
from torch.nn import functional as F

from flatlora_diffusion import FlatLora
from flatlora_diffusion.method.rivals import sketch
from flatlora_diffusion.method.rivals.sam import Sam

pytestmark = pytest.mark.usefixtures("draw")

SIGMA = 0.1
DORA = Adapter(dora=True)
ONE_BY_ONE = {"wide", "narrow", "pointwise"}


def dora_forward(layer: Any, eps: Tensor, inputs: Tensor) -> Tensor:
    """m / norm(V) * (W + eps + sBA) on the inputs, with norm(V) of the clean V = W + sBA and without a gradient."""
    base = layer.get_base_layer()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta = layer.scaling["default"] * (up.flatten(1) @ down.flatten(1)).view_as(base.weight)
    norm = (base.weight + delta).flatten(1).norm(dim=1).detach()
    scale = layer.lora_magnitude_vector["default"].weight.flatten() / norm
    weight = scale.view(-1, *[1] * (delta.ndim - 1)) * (base.weight + eps + delta)
    if isinstance(base, nn.Conv2d):
        return base._conv_forward(inputs, weight, base.bias)
    return F.linear(inputs, weight, base.bias)


def by_hand(model: nn.Module, noise: Mapping[str, Tensor]) -> nn.Module:
    layers = lora_layers(model)
    assert layers.keys() == noise.keys()
    for name, layer in layers.items():
        layer.forward = partial(dora_forward, layer, noise[name])
    return model


@pytest.mark.parametrize("build", [toy_case, unet_case, klein_case])
def test_loss_and_gradients_equal_the_dora_formula_with_noise_on_the_base_weight(build: object) -> None:
    assert callable(build)
    case = build(DORA)
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    noise = {name: flat.noise(name, step=1, slot=2) for name in flat.layers}
    with flat.perturb(step=1, slot=2):
        loss, ours = loss_and_gradients(case)
    expected_loss, expected = loss_and_gradients(case, by_hand(clean, noise))
    plain = loss_and_gradients(case)[1]
    apart = sum((expected[name] - plain[name]).square().sum() for name in plain)
    size = sum(gradient.square().sum() for gradient in plain.values())
    assert apart > 1e-4 * size, "too little noise to notice its absence"
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    assert ours.keys() == expected.keys()
    assert any("magnitude" in name for name in ours)
    floor = 1e-6 * max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + floor, name


def test_sam_ascends_by_rho_in_w_as_dora_rescales_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "SKETCH_RANK", 64)  # that of no slope here is above it
    case = toy_case(DORA)
    layers = lora_layers(case.model)
    eps = {name: torch.zeros_like(layer.get_base_layer().weight, requires_grad=True) for name, layer in layers.items()}
    case.loss(by_hand(copy.deepcopy(case.model), eps)).backward()
    slopes = {name: value.grad for name, value in eps.items()}
    norm = torch.stack([slope.norm() for slope in slopes.values() if slope is not None]).norm()
    moved = {name: 0.5 * slope / norm for name, slope in slopes.items() if slope is not None}
    expected = loss_and_gradients(case, by_hand(copy.deepcopy(case.model), moved))[1]
    plain = loss_and_gradients(case)[1]
    trainable = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    sam = Sam([case.model], trainable, rho=0.5, seed=0)
    sam.compute(0, [OneBatch(case)])
    ours = gradients(case.model)
    assert distance(expected, plain) > 0.01
    assert distance(ours, expected) < 1e-4


class OneBatch:
    slot = 0

    def __init__(self, case: Case) -> None:
        self._case = case

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        loss = self._case.loss()
        (loss * weight).backward()
        return loss.detach()


def test_without_sigma_dora_is_bit_equal_to_plain_dora() -> None:
    case = toy_case(DORA)
    loss, plain = loss_and_gradients(case)
    flat = FlatLora(case.model, schedule="cosine")
    with flat.perturb(step=0):
        result, ours = loss_and_gradients(case)
    assert torch.equal(result, loss)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def effective_weight(layer: Any, shape: torch.Size) -> Tensor:
    """The weight (m, n) a layer acts with, read off its outputs at one-hot inputs of one pixel or one token."""
    inputs = torch.eye(shape[1])
    with torch.no_grad():
        if len(shape) == 4:
            return layer(inputs[:, :, None, None])[:, :, 0, 0].T
        return layer(inputs).T


@pytest.mark.parametrize("name", sorted(ONE_BY_ONE))
def test_the_std_of_the_effective_noise_is_sigma_times_the_magnitude_over_root_fan_in(name: str) -> None:
    flat = FlatLora(toy_case(DORA).model, sigma=SIGMA, schedule="constant")
    layer: Any = flat.layers[name]
    shape = layer.get_base_layer().weight.shape
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().flatten()
    plain = effective_weight(layer, shape)
    noise = []
    for step in range(200):
        with flat.perturb(step=step):
            noise.append(effective_weight(layer, shape) - plain)
    assert_unit_variance(torch.stack(noise) / (SIGMA / math.sqrt(shape[1]) * magnitude)[:, None])


def test_the_std_of_the_inspected_noise_is_that_of_w_plus_sba_before_rescaling() -> None:
    model = toy_case(DORA).model
    flat = FlatLora(model, sigma=SIGMA, schedule="constant")
    for name, layer in lora_layers(model).items():
        norms = merged_weight(layer).flatten(1).norm(dim=1)
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().flatten()
        assert (norms / magnitude - 1).abs().max() > 0.2, "magnitude and norm are too alike to tell them apart"
        eps = torch.stack([flat.noise(name, step=step).flatten(1) for step in range(200)])
        assert_unit_variance(eps / (SIGMA / math.sqrt(eps.shape[2]) * norms)[:, None])
