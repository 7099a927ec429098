"""Loss and LoRA gradients inside `perturb` are those of W + eps, with eps added to W by hand on a copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lora_by_hand import add_to_base, all_noise, distance, gradients, lora_layers
from peft import LoraConfig, get_peft_model
from tiny_models import (
    CASES,
    DENOISERS,
    Adapter,
    Case,
    add_second_adapter,
    llama_case,
    loss_and_gradients,
    normal,
    seeded,
    toy_case,
)
from torch import Tensor, nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import ConfigError, NoiseKind

pytestmark = pytest.mark.usefixtures("draw")

SIGMA = 0.1


def perturbed(case: Case, flat: FlatLora, step: int, slot: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    with flat.perturb(step=step, slot=slot):
        return loss_and_gradients(case)


def by_hand(case: Case, clean: nn.Module, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return loss_and_gradients(case, add_to_base(copy.deepcopy(clean), noise))


def assert_close(
    result: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-4
) -> None:
    torch.testing.assert_close(result[0], expected[0], rtol=tolerance, atol=0)
    assert result[1].keys() == expected[1].keys()
    floor = 1e-6 * max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (result[1][name] - gradient).norm() <= tolerance * gradient.norm() + floor, name


@pytest.mark.parametrize(
    ("name", "noise"), [*((name, "filter") for name in CASES), ("toy", "iid"), ("unet_conv", "iid")]
)
def test_loss_and_gradients_equal_those_of_noise_added_to_the_weights_by_hand(name: str, noise: NoiseKind) -> None:
    case = CASES[name]()
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="cosine", total_steps=10, noise=noise)
    expected = by_hand(case, clean, all_noise(flat, step=7, slot=2))
    plain = loss_and_gradients(case, clean)
    assert distance(expected[1], plain[1]) > 0.01, "the noise is too weak for this test to notice its absence"
    assert_close(perturbed(case, flat, step=7, slot=2), expected)


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_noise_acts_in_train_and_in_eval_mode(denoiser: str, training: bool) -> None:
    case = DENOISERS[denoiser]()
    case.model.train(training)
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    assert_close(perturbed(case, flat, step=0), by_hand(case, clean, all_noise(flat, step=0)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_noise_acts_without_gradients(mode: type[torch.no_grad] | type[torch.inference_mode]) -> None:
    case = toy_case()
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    with mode(), flat.perturb(step=1):
        result = case.predict(case.model)
    with torch.no_grad():
        expected = case.predict(add_to_base(clean, all_noise(flat, step=1)))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_each_step_uses_the_sigma_and_the_lora_weights_of_that_step() -> None:
    """Nothing is carried over from the step before, neither its strength nor its filter norms."""
    case = toy_case()
    flat = FlatLora(case.model, sigma=SIGMA, schedule="cosine", total_steps=10)
    reference = toy_case().model
    for step in (2, 9):
        noise = all_noise(flat, step=step)
        assert_close(perturbed(case, flat, step=step), by_hand(case, reference, noise))
        for model in (case.model, reference):
            for layer in lora_layers(model).values():
                layer.lora_B["default"].weight.data.mul_(2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_can_follow_a_forward_without_gradients(
    mode: type[torch.no_grad] | type[torch.inference_mode],
) -> None:
    case = toy_case()
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    expected = perturbed(case, flat, step=1)
    with flat.perturb(step=1):
        with mode():
            case.predict(case.model)
        result = loss_and_gradients(case)
    assert_close(result, expected, tolerance=1e-6)


def test_the_sigma_given_to_perturb_replaces_the_schedule() -> None:
    case = toy_case()
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="cosine", total_steps=10, seed=4)
    with flat.perturb(step=0, sigma=0.2):
        result = loss_and_gradients(case)
    stronger = FlatLora(copy.deepcopy(clean), sigma=0.2, schedule="constant", seed=4)
    assert_close(result, by_hand(case, clean, all_noise(stronger, step=0)))


@pytest.mark.parametrize(
    ("padding", "reason"),
    [
        ({"padding": "same"}, r"1 \(padding 'same' with mode 'zeros' is not handled\)"),
        ({"padding": 1, "padding_mode": "circular"}, r"1 \(padding \(1, 1\) with mode 'circular' is not handled\)"),
    ],
    ids=str,
)
def test_unusual_padding_is_refused(padding: dict[str, Any], reason: str) -> None:
    with seeded(0):
        base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, **padding))
        model = get_peft_model(base, Adapter().config(("1",)))
    with pytest.raises(ConfigError, match=f"cannot perturb 1 adapted .*: {reason}"):
        FlatLora(model, sigma=SIGMA, schedule="constant")


def test_a_bare_parameter_is_refused() -> None:
    """PEFT's `target_parameters` makes W itself W + sBA while the layer runs."""
    with seeded(0):
        base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=["2.weight"]))
    with pytest.raises(
        ConfigError, match=r"cannot perturb 1 adapted .*: 2 \(ParamWrapper around Linear is not handled"
    ):
        FlatLora(model, sigma=SIGMA, schedule="constant")


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(Adapter(rslora=True, rank=3, alpha=5), id="rslora"),
        pytest.param(Adapter(bias="lora_only"), id="trained biases"),
    ],
)
def test_gradients_equal_the_reference_for_other_adapters(adapter: Adapter) -> None:
    case = toy_case(adapter)
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    assert_close(perturbed(case, flat, step=1), by_hand(case, clean, all_noise(flat, step=1)))


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [("wide", "narrow", (24,)), ("tall", "pointwise", (16, 9, 8))],
    ids=["linear", "conv"],
)
def test_gradients_equal_the_reference_for_one_sample_without_a_batch(
    first: str, second: str, shape: tuple[int, ...]
) -> None:
    """The gradients of trained biases and of the inputs between two layers keep their shapes."""
    toy = toy_case(Adapter(targets=(first, second), bias="lora_only")).model
    sample = normal(3, *shape)

    def predict(model: Any) -> Tensor:
        layers = lora_layers(model)
        output: Tensor = layers[second](layers[first](sample))
        return output

    case = Case(toy, predict, torch.zeros(predict(toy).shape))
    clean = copy.deepcopy(toy)
    flat = FlatLora(toy, sigma=SIGMA, schedule="constant")
    assert_close(perturbed(case, flat, step=1), by_hand(case, clean, all_noise(flat, step=1)))


def test_gradients_equal_the_reference_under_lora_dropout() -> None:
    case = toy_case(Adapter(dropout=0.3))
    case.model.train()
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    noise = all_noise(flat, step=1)
    torch.manual_seed(8)
    result = perturbed(case, flat, step=1)
    torch.manual_seed(8)
    assert_close(result, by_hand(case, clean, noise))


def test_gradients_equal_the_reference_with_two_active_adapters() -> None:
    case = toy_case()
    add_second_adapter(case)
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    assert_close(perturbed(case, flat, step=1), by_hand(case, clean, all_noise(flat, step=1)))


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_accumulated_gradients_equal_the_reference_with_one_noise_per_slot(denoiser: str) -> None:
    case = DENOISERS[denoiser]()
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    expected: dict[str, Tensor] = {}
    for slot in range(3):
        _, part = by_hand(case, clean, all_noise(flat, step=4, slot=slot))
        expected = {name: expected.get(name, torch.tensor(0.0)) + part[name] / 3 for name in part}
    for slot in range(3):
        with flat.perturb(step=4, slot=slot):
            (case.loss() / 3).backward()
    zero = torch.tensor(0.0)
    assert_close((zero, gradients(case.model)), (zero, expected))


@pytest.mark.parametrize(
    ("denoiser", "targets"),
    [*((denoiser, ()) for denoiser in DENOISERS), ("unet", ("conv1", "conv2", "to_q", "ff.net.2"))],
    ids=[*DENOISERS, "unet conv"],
)
def test_gradients_are_the_same_with_gradient_checkpointing(denoiser: str, targets: tuple[str, ...]) -> None:
    case = DENOISERS[denoiser](Adapter(targets=targets))
    case.model.train()
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    expected = perturbed(case, flat, step=5, slot=1)
    calls: list[str] = []
    for name, layer in lora_layers(case.model).items():
        layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    case.model.enable_gradient_checkpointing()
    result = perturbed(case, flat, step=5, slot=1)
    assert len(calls) > len(flat.layers), "no forward was run again, so checkpointing was not tested"
    assert_close(result, expected, tolerance=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_with_either_kind_of_checkpointing(reentrant: bool) -> None:
    case = llama_case()
    case.model.train()
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    expected = perturbed(case, flat, step=5)
    case.model.enable_input_require_grads()
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_close(perturbed(case, flat, step=5), expected, tolerance=1e-6)


@pytest.mark.parametrize("name", ["toy", "unet_conv", "klein"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_sigma_loss_and_gradients_are_bit_equal_to_plain_lora(name: str, dtype: torch.dtype) -> None:
    case = CASES[name](Adapter(dtype=dtype))
    plain = loss_and_gradients(case)
    for how in ("sigma", "override", "first step of a ramp"):
        flat = FlatLora(case.model, sigma=0.0 if how == "sigma" else SIGMA, schedule="cosine", total_steps=10)
        with flat.perturb(step=0 if how == "first step of a ramp" else 3, sigma=0.0 if how == "override" else None):
            result = loss_and_gradients(case)
        flat.detach()
        assert torch.equal(result[0], plain[0]), how
        assert all(torch.equal(result[1][key], plain[1][key]) for key in plain[1]), how
