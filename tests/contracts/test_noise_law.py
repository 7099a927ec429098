"""The law of eps: N(0, sigma^2 / n * norm of the merged filter ^ 2), another for every key."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from draw_statistics import assert_mean, assert_unit_variance
from lora_by_hand import lora_layers, merged_weight
from tiny_models import Adapter, add_second_adapter, toy_case, unet_case
from torch import Tensor

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import SigmaSchedule

pytestmark = pytest.mark.usefixtures("draw")

SIGMA = 0.1
DRAWS = 200
LAYERS = ["strided", "odd", "tall", "pointwise", "wide", "narrow"]


def merged_norms(layer: Any) -> Tensor:
    return merged_weight(layer).flatten(1).norm(dim=1)


def draws(flat: FlatLora, name: str) -> Tensor:
    """eps of `DRAWS` steps as matrices, (DRAWS, m, n)."""
    return torch.stack([flat.noise(name, step=step).float().flatten(1) for step in range(DRAWS)])


def standardized(flat: FlatLora, name: str, norms: Tensor) -> Tensor:
    eps = draws(flat, name)
    return eps / (SIGMA / math.sqrt(eps.shape[2]) * norms)[:, None]


@pytest.fixture
def flat() -> FlatLora:
    return FlatLora(toy_case().model, sigma=SIGMA, schedule="constant")


@pytest.mark.parametrize("name", LAYERS)
def test_the_std_of_each_row_is_sigma_times_its_merged_norm_over_root_fan_in(flat: FlatLora, name: str) -> None:
    assert_unit_variance(standardized(flat, name, merged_norms(flat.layers[name])))


@pytest.mark.parametrize("name", LAYERS)
def test_eps_is_normal_where_each_entry_is_drawn_by_itself(name: str) -> None:
    flat = FlatLora(toy_case().model, sigma=SIGMA, schedule="constant", draw="full")
    z = standardized(flat, name, merged_norms(flat.layers[name])).flatten()
    count = z.numel()
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / count)
    for bound in (0.25, 0.5, 1, 1.5, 2, 2.5, 3):
        inside = math.erf(bound / math.sqrt(2))
        error = math.sqrt(inside * (1 - inside) / count)
        assert abs((z.abs() < bound).float().mean() - inside) < 5 * error, f"share of |z| < {bound}"


@pytest.mark.parametrize("name", LAYERS)
def test_no_two_rows_and_no_two_places_in_a_row_are_correlated(flat: FlatLora, name: str) -> None:
    z = standardized(flat, name, merged_norms(flat.layers[name]))
    for values in (z, z.mT):
        products = values @ values.mT / values.shape[2]
        rows, columns = torch.triu_indices(products.shape[1], products.shape[1], offset=1)
        assert_mean(products[:, rows, columns], 0, errors=6.5)


def test_noise_of_different_keys_is_uncorrelated() -> None:
    """Different is not enough: steps, slots, seeds, layers of one shape and prefixes must share nothing."""
    model = unet_case().model
    twins = [name for name, layer in lora_layers(model).items() if layer.get_base_layer().weight.shape == (32, 32)]
    eps = []
    for seed, prefix in itertools.product((0, 1), ("unet", "text_encoder")):
        flat = FlatLora(model, sigma=SIGMA, schedule="constant", seed=seed, prefix=prefix)
        for name, step, slot in itertools.product(twins[:3], (0, 1, 2), (0, 1, 2)):
            noise = flat.noise(name, step=step, slot=slot).float()
            eps.append((noise / flat.filter_norms(name)[:, None]).flatten())
        flat.detach()
    values = torch.stack(eps)
    values /= values.norm(dim=1, keepdim=True)
    correlation = values @ values.T
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(values.shape[1])


def test_the_same_key_gives_the_same_eps_in_any_order_and_in_any_process_state() -> None:
    first = FlatLora(toy_case().model, sigma=SIGMA, schedule="constant", seed=3)
    keys = list(itertools.product(LAYERS, (0, 5), (0, 2)))
    drawn = {key: first.noise(key[0], step=key[1], slot=key[2]) for key in keys}
    case = toy_case()
    second = FlatLora(case.model, sigma=SIGMA, schedule="constant", seed=3)
    torch.manual_seed(99)
    with second.perturb(step=1):
        case.loss().backward()
    for name, step, slot in reversed(keys):
        assert torch.equal(second.noise(name, step=step, slot=slot), drawn[name, step, slot])


@pytest.mark.parametrize("change", [{"seed": 1}, {"prefix": "text_encoder"}, {"noise": "iid"}])
def test_another_seed_prefix_or_kind_of_noise_gives_another_eps(change: dict[str, Any]) -> None:
    model = toy_case().model
    settings: dict[str, Any] = {"seed": 0, "prefix": "unet", "noise": "filter"}
    first = FlatLora(copy.deepcopy(model), schedule="constant", **settings)
    other = FlatLora(model, schedule="constant", **{**settings, **change})
    assert not any(torch.equal(first.noise(name, step=1), other.noise(name, step=1)) for name in LAYERS)


def test_another_step_or_slot_gives_another_eps(flat: FlatLora) -> None:
    drawn = [flat.noise("wide", step=step, slot=slot) for step in range(5) for slot in range(5)]
    assert not any(torch.equal(first, second) for first, second in itertools.combinations(drawn, 2))


def test_the_noise_of_a_forward_is_the_inspected_noise() -> None:
    """The effective weight, read off one-hot inputs: perturbed minus plain is flat.noise, entry by entry."""
    case = toy_case()
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    for name in ("wide", "narrow"):
        layer: Any = flat.layers[name]
        inputs = torch.eye(layer.get_base_layer().in_features)
        with torch.no_grad():
            plain = layer(inputs)
            with flat.perturb(step=2, slot=3):
                effective = layer(inputs) - plain
        torch.testing.assert_close(effective.T, flat.noise(name, step=2, slot=3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_noise_and_norms_carry_no_gradient_graph(mode: Any) -> None:
    """eps is a constant of the loss: a graph through its norms would be kept alive and hold copies of W."""
    flat = FlatLora(toy_case().model, sigma=SIGMA, schedule="constant")
    with mode():
        drawn = [flat.noise("wide", step=1), flat.filter_norms("wide")]
    assert not any(tensor.requires_grad for tensor in drawn)


@pytest.mark.parametrize("schedule", ["cosine", "down", "constant"])
def test_eps_is_scaled_by_the_schedule_and_by_nothing_else(schedule: SigmaSchedule, draw: str) -> None:
    model = toy_case().model
    full = FlatLora(copy.deepcopy(model), sigma=SIGMA, schedule="constant")
    flat = FlatLora(model, sigma=SIGMA, schedule=schedule, total_steps=8)
    for step in (0, 3, 8, 20):
        expected = full.noise("wide", step=step) * (flat.sigma_at(step) / SIGMA)
        rounding = 2**-8 if draw == "low_rank" else 1e-5  # of U in bf16
        assert (flat.noise("wide", step=step) - expected).norm() <= rounding * expected.norm()


def test_iid_noise_has_the_same_energy_but_one_std_for_all_rows() -> None:
    model = toy_case().model
    flat = FlatLora(model, sigma=SIGMA, schedule="constant", noise="iid")
    for name in LAYERS:
        norms = merged_norms(flat.layers[name])
        assert norms.max() > 1.5 * norms.min(), "rows too alike to tell the two kinds of noise apart"
        assert_unit_variance(standardized(flat, name, norms.square().mean().sqrt().expand_as(norms)))


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(Adapter(rank=4, alpha=4), id="alpha is rank"),
        pytest.param(Adapter(rank=3, alpha=7), id="alpha is not rank"),
        pytest.param(Adapter(rank=5, alpha=3, rslora=True), id="rslora"),
        pytest.param(Adapter(dropout=0.5), id="dropout"),
    ],
)
def test_filter_norms_are_those_of_the_merged_weight(adapter: Adapter) -> None:
    """Checked again after the LoRA moved: a norm kept from an earlier step would be wrong."""
    flat = FlatLora(toy_case(adapter).model)
    for _ in range(2):
        for name in LAYERS:
            layer: Any = flat.layers[name]
            expected = merged_norms(layer)
            base_only = layer.get_base_layer().weight.detach().flatten(1).norm(dim=1)
            assert (expected / base_only - 1).abs().max() > 0.05, "BA is too small for this test to notice its absence"
            assert flat.filter_norms(name).shape == expected.shape
            torch.testing.assert_close(flat.filter_norms(name), expected, rtol=1e-5, atol=0)
            layer.lora_B["default"].weight.data.mul_(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_filter_norms_are_exact_in_low_precision(dtype: torch.dtype) -> None:
    flat = FlatLora(toy_case(Adapter(dtype=dtype)).model)
    for name in LAYERS:
        expected = merged_norms(flat.layers[name])
        torch.testing.assert_close(flat.filter_norms(name).float(), expected, rtol=2e-3, atol=0)


def test_filter_norms_count_every_active_adapter_and_only_those() -> None:
    case = toy_case()
    add_second_adapter(case)
    flat = FlatLora(case.model, schedule="constant")
    for active in (["default", "second"], ["second"], ["default"]):
        case.model.base_model.set_adapter(active)
        for name in LAYERS:
            assert flat.layers[name].active_adapters == active
            torch.testing.assert_close(flat.filter_norms(name), merged_norms(flat.layers[name]), rtol=1e-5, atol=0)


def test_filter_norms_stay_the_same_when_the_adapter_is_merged() -> None:
    """Merging moves BA into the base weight: W' is what it was."""
    case = toy_case()
    flat = FlatLora(case.model, schedule="constant")
    expected = {name: flat.filter_norms(name) for name in LAYERS}
    case.model.merge_adapter()
    for name in LAYERS:
        torch.testing.assert_close(flat.filter_norms(name), expected[name], rtol=1e-4, atol=0)


def test_filter_norms_follow_the_adapter_strength() -> None:
    case = toy_case()
    flat = FlatLora(case.model, schedule="constant")
    layer: Any = flat.layers["wide"]
    before = layer.get_delta_weight("default").detach()
    layer.scale_layer(2.0)
    expected = (layer.get_base_layer().weight + 2 * before).detach().norm(dim=1)
    torch.testing.assert_close(flat.filter_norms("wide"), expected, rtol=1e-5, atol=0)


def test_a_zero_filter_gets_no_noise() -> None:
    """Cancellation in the norm's three terms must not turn a zero row into NaN or noise."""
    case = toy_case()
    flat_layer = lora_layers(case.model)["wide"]
    merged = merged_weight(flat_layer)
    delta = merged - flat_layer.get_base_layer().weight.detach()
    flat_layer.get_base_layer().weight.data[3] = -delta[3]
    flat_layer.get_base_layer().weight.data[4] = 0
    flat_layer.lora_B["default"].weight.data[4] = 0
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    assert flat.filter_norms("wide").isfinite().all()
    assert flat.filter_norms("wide")[3] < 1e-3
    assert flat.filter_norms("wide")[4] == 0
    assert flat.noise("wide", step=1)[4].abs().max() == 0
