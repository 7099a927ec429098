"""FlatLora's settings: the sigma ramp, what is refused, what a checkpoint carries."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tiny_models import toy_case
from torch import nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.method.noise_config import NoiseConfig

pytestmark = pytest.mark.usefixtures("draw")


@pytest.fixture
def model() -> nn.Module:
    return toy_case().model


def test_schedule_down_is_the_reversed_cosine_ramp_and_sigma_may_exceed_1(model: nn.Module) -> None:
    flat = FlatLora(model, sigma=1.4, schedule="down", total_steps=10)
    assert [round(flat.sigma_at(step), 6) for step in (0, 5, 10, 25)] == [1.4, 0.7, 0.0, 0.0]
    flat.detach()
    up = FlatLora(model, sigma=1.4, schedule="cosine", total_steps=10)
    assert [up.sigma_at(step) for step in range(10)] == pytest.approx(
        [1.4 - NoiseConfig(1.4, "down", 10).sigma_at(step) for step in range(10)]
    )


def test_the_ramp_starts_at_zero_and_ends_at_sigma(model: nn.Module) -> None:
    flat = FlatLora(model, sigma=0.2, schedule="cosine", total_steps=10)
    assert flat.sigma_at(0) == 0
    values = [flat.sigma_at(step) for step in range(11)]
    assert values == sorted(set(values))
    for step in (10, 11, 1000):
        assert flat.sigma_at(step) == pytest.approx(0.2, rel=1e-12)
    assert flat.sigma_at(5) == pytest.approx(0.1)


def test_the_cosine_ramp_is_half_of_one_minus_cosine(model: nn.Module) -> None:
    flat = FlatLora(model, sigma=0.2, schedule="cosine", total_steps=10)
    for step in range(11):
        assert flat.sigma_at(step) == pytest.approx(0.2 * 0.5 * (1 - math.cos(math.pi * step / 10)), abs=1e-12)


def test_constant_is_sigma_from_the_first_step(model: nn.Module) -> None:
    flat = FlatLora(model, sigma=0.2, schedule="constant", total_steps=10)
    assert [flat.sigma_at(step) for step in (0, 1, 9, 10, 99)] == [0.2] * 5


def test_the_documentation_has_the_defaults(model: nn.Module) -> None:
    flat = FlatLora(model)
    expected = FlatLora(
        toy_case().model, sigma=0.1, schedule="cosine", total_steps=500, seed=0, noise="filter", prefix="unet"
    )
    assert [flat.sigma_at(step) for step in (0, 100, 500)] == [expected.sigma_at(step) for step in (0, 100, 500)]
    assert torch.equal(flat.noise("wide", step=100), expected.noise("wide", step=100))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sigma", -0.1),
        ("sigma", math.nan),
        ("sigma", math.inf),
        ("schedule", "exponential"),
        ("noise", "uniform"),
        ("draw", "sparse"),
        ("total_steps", 0),
        ("total_steps", -5),
        ("total_steps", 2.5),
        ("norm_every", 0),
        ("seed", -1),
        ("seed", "zero"),
        ("seed", True),
    ],
)
def test_an_invalid_setting_is_refused_by_name_and_value(model: nn.Module, setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){setting}.*{value}"):
        FlatLora(model, **{setting: value})


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
def test_an_invalid_sigma_override_is_refused(model: nn.Module, sigma: float) -> None:
    flat = FlatLora(model)
    with pytest.raises(ConfigError, match="sigma"), flat.perturb(step=1, sigma=sigma):
        pass
    with flat.perturb(step=1):
        pass


@pytest.mark.parametrize("key", [{"step": -1}, {"step": 1, "slot": -1}, {"step": 1.5}, {"step": 1, "slot": None}])
def test_a_negative_or_fractional_step_or_slot_is_refused(model: nn.Module, key: dict[str, Any]) -> None:
    flat = FlatLora(model)
    with pytest.raises(ConfigError, match=r"(step|slot)=.* must be a whole number"), flat.perturb(**key):
        pass


def test_nested_perturb_raises_and_the_outer_one_still_ends(model: nn.Module) -> None:
    case = toy_case()
    flat = FlatLora(case.model, schedule="constant")
    with torch.no_grad():
        plain = case.predict(case.model)
        with flat.perturb(step=1):
            noisy = case.predict(case.model)
            with pytest.raises((RuntimeError, ConfigError)), flat.perturb(step=2):
                pass
            assert torch.equal(case.predict(case.model), noisy)
        assert torch.equal(case.predict(case.model), plain)
        with flat.perturb(step=1):
            assert torch.equal(case.predict(case.model), noisy)


SAVED: dict[str, Any] = {"sigma": 0.3, "schedule": "cosine", "total_steps": 40, "seed": 12}


def test_state_dict_carries_seed_sigma_schedule_and_total_steps(model: nn.Module) -> None:
    saved = FlatLora(model, **SAVED).state_dict()
    for key, value in SAVED.items():
        assert saved[key] == value
    assert json.loads(json.dumps(saved)) == saved, "a checkpoint's header is JSON"


def test_arguments_override_the_config(model: nn.Module) -> None:
    flat = FlatLora(model, NoiseConfig(sigma=0.3, seed=4), seed=5)
    assert flat.config == NoiseConfig(sigma=0.3, seed=5)
    with pytest.raises(TypeError, match="rho"):
        FlatLora(toy_case().model, rho=0.1)


def test_a_state_with_an_eps_for_each_example_is_refused(model: nn.Module) -> None:
    flat = FlatLora(model)
    flat.load_state_dict({**flat.state_dict(), "per_example": False})
    with pytest.raises(ConfigError, match="per_example=True"):
        flat.load_state_dict({**flat.state_dict(), "per_example": True})


def test_a_loaded_state_continues_with_the_same_noise(model: nn.Module) -> None:
    first = FlatLora(model, **SAVED)
    second = FlatLora(toy_case().model)
    assert not torch.equal(second.noise("wide", step=7, slot=1), first.noise("wide", step=7, slot=1))
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert [second.sigma_at(step) for step in range(50)] == [first.sigma_at(step) for step in range(50)]
    assert torch.equal(second.noise("wide", step=7, slot=1), first.noise("wide", step=7, slot=1))


def test_a_state_from_before_low_rank_draws_continues_with_full_draws(model: nn.Module) -> None:
    state = FlatLora(toy_case().model, **SAVED, draw="full").state_dict()
    del state["draw"], state["norm_every"]
    flat = FlatLora(model)
    flat.load_state_dict(state)
    assert flat.state_dict()["draw"] == "full"
    expected = FlatLora(toy_case().model, **SAVED, draw="full").noise("wide", step=7)
    assert torch.equal(flat.noise("wide", step=7), expected)


@pytest.mark.parametrize("damage", ["missing", "unknown", "invalid sigma", "invalid schedule", "invalid total_steps"])
def test_a_state_of_another_model_is_refused_and_changes_nothing(model: nn.Module, damage: str) -> None:
    flat = FlatLora(model, schedule="constant")
    before, noise = flat.state_dict(), flat.noise("wide", step=3)
    bad: dict[str, Any] = {**before, **SAVED}
    match damage:
        case "missing":
            del bad["schedule"]
        case "unknown":
            bad["rho"] = 0.1
        case "invalid sigma":
            bad["sigma"] = -1.0
        case "invalid total_steps":
            bad["total_steps"] = 0
        case _:
            bad["schedule"] = "exponential"
    with pytest.raises(ConfigError):
        flat.load_state_dict(bad)
    assert flat.state_dict() == before
    assert torch.equal(flat.noise("wide", step=3), noise)


@pytest.mark.parametrize(
    "change", [{"noise": "iid"}, {"draw": "full"}, {"draw": "low_rank"}, {"prefix": "text_encoder"}]
)
def test_a_state_restores_the_kind_of_noise_and_the_prefix(model: nn.Module, change: dict[str, Any]) -> None:
    saved = FlatLora(toy_case().model, schedule="constant", **change)
    flat = FlatLora(model, schedule="constant")
    flat.load_state_dict(saved.state_dict())
    assert torch.equal(flat.noise("wide", step=3), saved.noise("wide", step=3))
