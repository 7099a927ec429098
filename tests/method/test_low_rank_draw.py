"""Low-rank draws: the mean and the covariance of Eq. 7, as more ranks of the LoRA's own branch."""

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from draw_statistics import assert_mean
from lora_by_hand import add_to_base, all_noise, distance, lora_layers, merged_weight
from peft import get_peft_model
from tiny_models import (
    ATTENTION_AND_CONV,
    Adapter,
    Case,
    loss_and_gradients,
    normal,
    randomize_adapters,
    seeded,
    toy_case,
    unet_case,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import AdapterConfig, ModelConfig
from flatlora_diffusion.method.draw import DRAW_RANK, DrawKey, LowRankDraw
from flatlora_diffusion.method.layers import AdaptedLayer, find_adapted_layers
from flatlora_diffusion.method.row_norms import RowStds
from flatlora_diffusion.storage.rng import derive_seed

SIGMA = 0.2
COUNT = 4000


def low_rank(model: nn.Module, **settings: Any) -> FlatLora:
    return FlatLora(model, sigma=SIGMA, schedule="constant", draw="low_rank", **settings)


def one_layer_case() -> Case:
    """One linear layer of 5 filters of 6 inputs."""
    with seeded(0):
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), Adapter().config(("0",)))
    randomize_adapters(model)
    inputs = normal(1, 3, 6)
    return Case(model, lambda module: module(inputs), normal(2, 3, 5))


def test_the_defaults_are_low_rank_draws_with_norms_of_each_step() -> None:
    settings = FlatLora(one_layer_case().model).config
    assert (settings.draw, settings.norm_every) == ("low_rank", 1)


@pytest.fixture(scope="module")
def z() -> Tensor:
    """The 30 entries of `COUNT` draws, each over the standard deviation that Eq. 7 gives its row."""
    model = one_layer_case().model
    flat = low_rank(model)
    stds = SIGMA / math.sqrt(6) * merged_weight(lora_layers(model)["0"]).norm(dim=1)
    return torch.stack([(flat.noise("0", step) / stds[:, None]).flatten() for step in range(COUNT)])


def test_each_entry_has_the_mean_and_the_variance_of_eq_7(z: Tensor) -> None:
    assert_mean(z, 0, errors=5)
    assert_mean(z.square(), 1, errors=5)
    assert_mean(z.square().mean(dim=1), 1, errors=4)


def test_no_two_entries_are_correlated(z: Tensor) -> None:
    rows, columns = torch.triu_indices(30, 30, offset=1)
    assert_mean(z[:, rows] * z[:, columns], 0, errors=5.5)


def test_only_the_fourth_moment_differs_from_full_draws(z: Tensor) -> None:
    """3 + 6 / k, of a sum of k products of two normal numbers; 3 would be that of a normal number."""
    assert_mean((z**4).mean(dim=1), 3 + 6 / DRAW_RANK, errors=5)
    assert float((z**4).mean()) > 4


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_a_convolution_has_the_gradients_that_autograd_computes_through_the_sum_of_its_weights(
    kernel: int, stride: int
) -> None:
    base = nn.Conv2d(6, 10, kernel, stride, kernel // 2)
    model: Any = get_peft_model(nn.Sequential(base), Adapter(rank=3, alpha=5).config(("0",)))
    randomize_adapters(model.double())
    flat = low_rank(model)
    x = normal(1, 2, 6, 7, 8).double().requires_grad_()
    with flat.perturb(step=1):
        output = model(x)
        output.square().sum().backward()
    layer = lora_layers(model)["0"]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    actual = [x.grad, down.grad, up.grad]
    update = (up.flatten(1) @ down.flatten(1)).view(base.weight.shape)
    weight = base.weight.detach() + flat.noise("0", 1) + 5 / 3 * update
    expected = nn.functional.conv2d(x, weight, base.bias, stride, kernel // 2)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)  # `noise` rounds eps to fp32
    close(output, expected)
    close(actual, list(torch.autograd.grad(expected.square().sum(), [x, down, up])))


def products(case: Case) -> Counter[str]:
    """How often a forward and backward call each operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        case.loss().backward()
    case.model.zero_grad(set_to_none=True)
    return Counter({event.key: event.count for event in profile.key_averages()})


@pytest.mark.parametrize("targets", [(), ATTENTION_AND_CONV], ids=["attention", "convolutions"])
def test_a_perturbed_pass_has_as_many_matrix_products_as_plain_lora(targets: tuple[str, ...]) -> None:
    """A layer that draws nothing in its passes, reads W as plain LoRA does and only has a wider branch."""
    case = unet_case(Adapter(targets=targets))
    flat = low_rank(case.model)
    plain = products(case)
    with flat.perturb(step=1):
        ours = products(case)
    assert ours["aten::convolution"] == plain["aten::convolution"] > 0
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
    assert sum(ours[name] for name in names) == sum(plain[name] for name in names) > 0
    assert not {"aten::normal_", "aten::randn"} & {name for name in ours if ours[name] > plain[name]}


def test_large_inputs_in_fp16_do_not_overflow_in_the_branch() -> None:
    with seeded(0):
        model = get_peft_model(nn.Sequential(nn.Linear(1600, 8)), Adapter(rank=16).config(("0",)))
    x = normal(1, 5, 1600) * 2000
    half = copy.deepcopy(model).half()
    with low_rank(model).perturb(0), low_rank(half).perturb(0):
        exact, rounded = model(x), half(x.half())
    assert (rounded - exact).norm() < 0.01 * exact.norm()


class Casts(TorchDispatchMode):
    """The dtypes that tensors of a shape are cast to."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.dtypes = shape, list[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and output.shape == self.shape:
            self.dtypes.append(output.dtype)
        return output


def test_under_autocast_an_input_in_fp32_and_its_gradient_are_cast_once() -> None:
    """PEFT casts both twice, for the base layer and for A: the outputs of SDXL's LayerNorms."""
    case = one_layer_case()
    layer: Any = lora_layers(case.model)["0"]
    layer.get_base_layer().bfloat16()
    flat, counted = low_rank(case.model), []
    for is_perturbed in (True, False):
        x = normal(1, 2, 7, 6).requires_grad_() * 1  # of a leaf autocast would keep the cast
        with flat.perturb(0), Casts(x.shape) as casts:
            with nullcontext() if is_perturbed else flat.disabled(), torch.autocast("cpu", torch.bfloat16):
                output = case.model(x)
            output.float().sum().backward()
        counted.append(Counter(casts.dtypes))
    assert counted[0] == {torch.bfloat16: 1, torch.float32: 1}
    assert counted[1] == {torch.bfloat16: 2, torch.float32: 2}


@pytest.mark.parametrize("adapter", [Adapter(), Adapter(dropout=0.2)], ids=["in the branch", "beside it"])
def test_a_strength_that_changes_inside_perturb_leaves_eps_as_it_was(adapter: Adapter) -> None:
    """diffusers scales LoRA layers within a forward that is given a `scale`; eps is no part of the LoRA."""
    case = toy_case(adapter)
    case.model.eval()
    clean = copy.deepcopy(case.model)
    flat = low_rank(case.model)
    noise = all_noise(flat, step=1)
    with flat.perturb(step=1):
        for layer in lora_layers(case.model).values():
            layer.scale_layer(0.5)
        loss, gradients = loss_and_gradients(case)
    for layer in lora_layers(clean).values():
        layer.scale_layer(0.5)
    expected_loss, expected = loss_and_gradients(case, add_to_base(clean, noise))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    assert distance(gradients, expected) < 1e-4


def test_weights_that_change_inside_perturb_are_seen_and_leave_eps_as_it_was() -> None:
    case = toy_case()
    clean = copy.deepcopy(case.model)
    flat = low_rank(case.model)
    noise = all_noise(flat, step=1)
    with flat.perturb(step=1):
        move(case.model)
        loss, gradients = loss_and_gradients(case)
    move(clean)
    expected_loss, expected = loss_and_gradients(case, add_to_base(clean, noise))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    assert distance(gradients, expected) < 1e-4


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A["default"].weight.mul_(2)


def test_a_lora_of_strength_zero_is_still_perturbed() -> None:
    case = toy_case()
    for layer in lora_layers(case.model).values():
        layer.set_scale("default", 0.0)
    clean = copy.deepcopy(case.model)
    flat = low_rank(case.model)
    with torch.no_grad(), flat.perturb(step=1):
        actual = case.predict(case.model)
    with torch.no_grad():
        expected = case.predict(add_to_base(clean, all_noise(flat, step=1)))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_draw_does_not_depend_on_rank_and_strength() -> None:
    """Arms that differ in them are compared under alike noise: only the norms of W' differ."""
    noises = []
    for adapter in (Adapter(), Adapter(rank=2, alpha=1)):
        model = toy_case(adapter).model
        flat = low_rank(model)
        noises.append({name: flat.noise(name, 1) / flat.filter_norms(name).view(-1, 1) for name in ("wide", "narrow")})
    for name, noise in noises[0].items():
        assert (noises[1][name] - noise).norm() < 2**-7 * noise.norm()


KEY = DrawKey(seed=3, prefix="unet", step=5, slot=1)


@pytest.fixture
def equal_layers() -> list[AdaptedLayer]:
    """Two layers of 30 filters of 30 inputs."""
    model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30))
    return find_adapted_layers(get_peft_model(model, Adapter().config(("0", "2"))))


def drawn(groups: list[list[AdaptedLayer]]) -> list[Tensor]:
    """The eps of each layer at row stds of 1, as if each group of layers were on a device of its own."""
    layers = [layer for group in groups for layer in group]
    stds = [RowStds(group, torch.ones(30 * len(group))) for group in groups]
    draw = LowRankDraw({layer.name: layer for layer in layers}, stds, 1.0, KEY)
    return [draw.noise(layer.name) for layer in layers]


def test_equal_layers_on_two_devices_have_different_draws(equal_layers: list[AdaptedLayer]) -> None:
    first, second = drawn([[layer] for layer in equal_layers])
    assert abs(float(torch.cosine_similarity(first.flatten(), second.flatten(), dim=0))) < 5 / 30


def test_the_draws_of_one_device_are_those_of_earlier_versions(equal_layers: list[AdaptedLayer]) -> None:
    """Their formula, written out: published runs can be had again."""
    rng = torch.Generator().manual_seed(derive_seed(3, "low-rank perturbation", "unet", 5, 1))
    ups, downs = (torch.empty(DRAW_RANK, 60).normal_(generator=rng) for _ in range(2))
    downs, ups = downs.bfloat16().float(), (ups / math.sqrt(DRAW_RANK)).bfloat16().float()
    pairs = zip(downs.split(30, dim=1), ups.split(30, dim=1), strict=True)
    for actual, (down, up) in zip(drawn([equal_layers]), pairs, strict=True):
        assert torch.equal(actual, up.mT @ down)


def test_factors_and_norms_of_all_layers_of_sdxl_take_14_3_mb() -> None:
    from flatlora_diffusion.adapter.lora import add_lora
    from flatlora_diffusion.families.sdxl.shapes import on_meta

    unet = on_meta(ModelConfig(pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0"), "unet")
    add_lora(unet, AdapterConfig(), seed=0)
    shapes = [layer.get_base_layer().weight.shape for layer in lora_layers(unet).values()]
    assert len(shapes) == 560
    rows = sum(shape[0] for shape in shapes)
    assert 2 * DRAW_RANK * sum(map(sum, shapes)) + 4 * rows == pytest.approx(14.3e6, rel=0.01)
