"""Layers share the small operations of their norms; each must still get its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers, merged_weight
from peft import LoraConfig, get_peft_model
from tiny_models import seeded
from torch import Tensor, nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import NoiseKind
from flatlora_diffusion.method import row_norms
from flatlora_diffusion.method.layers import find_adapted_layers
from flatlora_diffusion.method.row_norms import merged_square_norms


def many_layers() -> nn.Module:
    """40 layers: 34 of one shape, of which two differ in rank and three in scale; 6 of another shape."""
    model = nn.Sequential(*[nn.Linear(12, 8) for _ in range(34)], *[nn.Linear(8, 12) for _ in range(6)])
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[str(number) for number in range(40)],
        rank_pattern={r"^3$": 2, r"^17$": 2},
        alpha_pattern={r"^5$": 1, r"^6$": 1, r"^33$": 9},
        init_lora_weights=False,
    )
    return get_peft_model(model, config)


def test_each_layer_gets_the_norms_of_its_own_merged_weight() -> None:
    with seeded(0):
        model = many_layers()
    by_hand = lora_layers(model)
    seen = set()
    with torch.no_grad():
        for group, square_norms in merged_square_norms(find_adapted_layers(model)):
            assert square_norms.shape == (len(group), group[0].shape[0])
            for layer, norms in zip(group, square_norms.sqrt(), strict=True):
                torch.testing.assert_close(norms, merged_weight(by_hand[layer.name]).norm(dim=1), rtol=1e-5, atol=0)
                seen.add(layer.name)
    assert seen == set(by_hand)


def move(model: nn.Module) -> None:
    for layer in lora_layers(model).values():
        layer.lora_B["default"].weight.data.mul_(3)


def moved_noise(flat: FlatLora, model: nn.Module, steps: range, start: int = 0) -> list[Tensor]:
    """eps of each step, in which the model takes a perturbed pass and its LoRA grows."""
    noises = []
    for step in steps:
        if step >= start:
            with flat.perturb(step):
                noises.append(flat.noise("5", step))
        move(model)
    return noises


@pytest.mark.parametrize("noise", ["filter", "iid"])
def test_norms_are_those_of_the_first_step_of_each_interval(noise: NoiseKind, draw: str) -> None:
    models = []
    for _ in range(2):
        with seeded(0):
            models.append(many_layers())
    every, once = (FlatLora(models[i], schedule="constant", noise=noise, norm_every=n) for i, n in ((0, 1), (1, 3)))
    fresh = moved_noise(every, models[0], range(7))
    cached = moved_noise(once, models[1], range(7))
    alike = [torch.equal(first, second) for first, second in zip(fresh, cached, strict=True)]
    assert alike == [True, False, False, True, False, False, True]
    assert every.norm_state() is None
    assert once.state_bytes > every.state_bytes


def test_a_run_resumed_within_an_interval_draws_the_same_eps(draw: str) -> None:
    models = []
    for _ in range(2):
        with seeded(0):
            models.append(many_layers())
    whole, resumed = (FlatLora(model, schedule="constant", norm_every=4) for model in models)
    first = moved_noise(whole, models[0], range(2))
    state = whole.norm_state()
    assert state is not None
    resumed.load_norm_state(state)
    later = moved_noise(whole, models[0], range(2, 6))
    noises = moved_noise(resumed, models[1], range(6), start=2)
    assert len(first) == 2
    assert all(torch.equal(first, second) for first, second in zip(later, noises, strict=True))


@pytest.mark.parametrize(("rank", "together"), [(1, 16), (4, 4), (32, 1)])
def test_grouped_layers_take_no_more_memory_than_the_largest_layer(
    rank: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A, B and two products of B's size: 4 * 64 * rank numbers a layer, against the 64 * 64 of one eps."""
    monkeypatch.setattr(row_norms, "FREE", 0)
    layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)])
    model = get_peft_model(layers, LoraConfig(r=rank, target_modules=[str(number) for number in range(20)]))
    with torch.no_grad():
        sizes = [len(group) for group, _ in merged_square_norms(find_adapted_layers(model))]
    assert sum(sizes) == 20
    assert max(sizes) == together


def test_micro_batches_of_a_step_share_its_norms_and_the_next_step_computes_new_norms(
    draw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def counting(layers: Any) -> Any:
        taken.append(1)
        return merged_square_norms(layers)

    monkeypatch.setattr(row_norms, "merged_square_norms", counting)
    with seeded(0):
        model = many_layers()
    flat = FlatLora(model, schedule="constant")
    plain = [flat.noise(name, 0, slot) for slot in range(3) for name in flat.layers]
    taken.clear()
    with flat.frozen_norms():
        for slot in range(3):
            with flat.perturb(0, slot):
                pass
        assert len(taken) == 1
        with flat.perturb(1):
            pass
        assert len(taken) == 2
        with flat.perturb(0):
            pass
        shared = [flat.noise(name, 0, slot) for slot in range(3) for name in flat.layers]
    assert all(torch.equal(first, second) for first, second in zip(plain, shared, strict=True))
    assert flat.norm_state() is None, "what was shared is gone with the step"
    taken.clear()
    for slot in range(2):
        with flat.perturb(0, slot):
            pass
    assert len(taken) == 2, "outside of it whoever moves A and B is not given old norms"
