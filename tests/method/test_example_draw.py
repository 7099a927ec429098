"""An eps for each example: its gradient is that of W + its own eps, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from draw_statistics import assert_mean
from lora_by_hand import add_to_base, distance, gradients
from tiny_models import Adapter, Case, normal, toy_case, unet_case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import ConfigError

SIGMA = 0.2


def per_example(model: nn.Module, **settings: Any) -> FlatLora:
    return FlatLora(model, sigma=SIGMA, schedule="constant", draw="low_rank", per_example=True, **settings)


def noise_of(flat: FlatLora, example: int) -> dict[str, Tensor]:
    return {name: flat.noise(name, step=1, slot=2, example=example) for name in flat.layers}


def output(case: Case, model: nn.Module, chosen: int | slice = slice(None)) -> Tensor:
    return case.predict(model)[chosen].float()


def gradients_of(case: Case, model: nn.Module, example: int) -> dict[str, Tensor]:
    """Of the loss of one example."""
    nn.functional.mse_loss(output(case, model, example), case.target[example]).backward()
    return gradients(model)


CASES = {
    "toy": toy_case,
    "unet": unet_case,
    "dropout": lambda: toy_case(Adapter(dropout=0.3)),
}


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_each_example_is_that_of_its_own_eps_in_the_weights(name: str, is_checkpointed: bool) -> None:
    case = CASES[name]()
    case.model.eval()  # dropout would draw
    if is_checkpointed:
        plain = case.predict
        case = Case(case.model, lambda model: checkpoint(plain, model, use_reentrant=False), case.target)
    clean = copy.deepcopy(case.model)
    flat = per_example(case.model)
    found = []
    with flat.perturb(step=1, slot=2):
        for example in range(len(case.target)):
            found.append(gradients_of(case, case.model, example))
    assert len(found) > 1
    for example, ours in enumerate(found):
        by_hand = add_to_base(copy.deepcopy(clean), noise_of(flat, example))
        expected = gradients_of(case, by_hand, example)
        assert distance(ours, expected) < 1e-4
        assert distance(ours, gradients_of(case, clean, example)) > 0.01, "too little noise to see it"
        other = add_to_base(copy.deepcopy(clean), noise_of(flat, (example + 1) % len(found)))
        assert distance(ours, gradients_of(case, other, example)) > 0.01, "examples share their eps"


def test_sigma_0_is_plain_lora_bit_for_bit() -> None:
    case = unet_case()
    case.loss().backward()
    plain = gradients(case.model)
    flat = per_example(case.model)
    with flat.perturb(step=1, sigma=0.0):
        case.loss().backward()
    for name, gradient in gradients(case.model).items():
        assert torch.equal(gradient, plain[name])


def test_an_examples_eps_has_the_law_of_eq_7_and_is_its_own() -> None:
    flat = per_example(toy_case().model)
    layer: Any = flat.layers["narrow"]
    stds = SIGMA / layer.in_features**0.5 * flat.filter_norms("narrow")
    z = torch.stack(
        [
            torch.stack([(flat.noise("narrow", step, example=one) / stds[:, None]).flatten() for one in (0, 1)])
            for step in range(400)
        ]
    )
    assert_mean(z, 0)
    assert_mean(z.square(), 1)
    assert_mean(z[:, 0] * z[:, 1], 0)


def test_an_examples_eps_does_not_depend_on_how_many_there_are() -> None:
    """Nor on what was asked for before: a last, smaller batch and a look at one eps draw the same."""
    flat = per_example(toy_case().model)
    alone = flat.noise("wide", step=1, example=1)
    case = toy_case()
    other = per_example(case.model)
    layer: Any = other.layers["wide"]
    inputs = torch.eye(24).expand(5, 24, 24)
    with torch.no_grad():
        plain = layer(inputs)
        with other.perturb(step=1):
            first, whole = layer(inputs[:2]), layer(inputs)
    torch.testing.assert_close(first - plain[:2], whole[:2] - plain[:2])
    torch.testing.assert_close((whole - plain)[1].T, alone, rtol=1e-4, atol=1e-5)


def test_gradients_can_follow_a_forward_in_inference_mode() -> None:
    found = []
    for is_first in (True, False):
        case = toy_case()
        # In bf16 the factors are what a backward keeps; in fp32 it would keep copies of them.
        with per_example(case.model).perturb(step=1), torch.autocast("cpu", torch.bfloat16):
            if is_first:
                with torch.inference_mode():
                    case.predict(case.model)
            case.loss().backward()
        found.append(gradients(case.model))
    after, expected = found
    assert after
    for name, gradient in after.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("shape", [(24,), (3, 24), (3, 2, 5, 24)], ids=str)
def test_inputs_of_any_dimensions_are_taken(shape: tuple[int, ...]) -> None:
    flat = per_example(toy_case().model)
    layer: Any = flat.layers["wide"]
    inputs = normal(1, *shape)
    with torch.no_grad(), flat.perturb(step=1):
        noisy = layer(inputs)
    expected = [
        one @ flat.noise("wide", step=1, example=index).T
        for index, one in enumerate(inputs if len(shape) > 1 else inputs[None])
    ]
    with torch.no_grad():
        plain = layer(inputs)
    torch.testing.assert_close(noisy - plain, torch.stack(expected).reshape(noisy.shape), rtol=1e-4, atol=1e-5)


def test_only_low_rank_draws_have_an_eps_for_each_example() -> None:
    for draw in ("full", "philox"):
        with pytest.raises(ConfigError, match="per_example needs draw='low_rank'"):
            FlatLora(toy_case().model, draw=draw, per_example=True)


def test_a_state_says_so_and_one_of_before_means_no() -> None:
    flat = per_example(toy_case().model)
    state = flat.state_dict()
    assert state["per_example"] is True
    other = FlatLora(toy_case().model)
    other.load_state_dict(state)
    assert torch.equal(other.noise("wide", 1, example=2), flat.noise("wide", 1, example=2))
    del state["per_example"]
    other.load_state_dict(state)
    assert not other.settings.per_example
