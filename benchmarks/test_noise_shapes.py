"""The shapes of sigma that `noise_shapes` tries, and what it trains with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import toy_case

from benchmarks.noise_shapes import ARMS, LAYERS, SIGMA, Shape, Shaped, Signed, differences, section


def shape(arm: str) -> Shape:
    found = ARMS[arm]
    assert found is not None
    return found


@pytest.mark.parametrize("arm", ["one sigma", "more at noisy timesteps", "more at clean timesteps"])
def test_the_mean_over_timesteps_is_the_same(arm: str) -> None:
    sigmas = [shape(arm)(step / 1000, 0)[0] for step in range(1001)]
    assert sum(sigmas) / len(sigmas) == pytest.approx(SIGMA)
    assert min(sigmas) >= 0


def test_each_micro_batch_has_the_sigma_of_its_timestep_and_its_own_draw() -> None:
    seen: list[Any] = []

    @contextmanager
    def perturb(step: int, slot: int, sigma: float) -> Iterator[None]:
        seen.append((step, slot, sigma))
        yield

    def micro_batch(slot: int, timestep: int) -> Any:
        loss = partial(float, torch.tensor([timestep]))
        return SimpleNamespace(slot=slot, loss=loss, backward=lambda: torch.zeros(()))

    flat: Any = SimpleNamespace(perturb=perturb)
    Shaped(flat, shape("more at noisy timesteps"), 1000).take(7, [micro_batch(0, 250), micro_batch(1, 1000)])
    assert seen == [(7, 0, pytest.approx(SIGMA / 2)), (7, 1, pytest.approx(2 * SIGMA))]


def test_opposite_pairs_have_one_eps_with_both_signs() -> None:
    pairs = [shape("opposite pairs")(0.5, slot) for slot in range(4)]
    assert pairs == [(SIGMA, 0), (-SIGMA, 0), (SIGMA, 1), (-SIGMA, 1)]
    case = toy_case()
    flat = Signed(case.model, draw="low_rank")
    plus, minus = (flat.noise("wide", 0, 0, sigma) for sigma in (SIGMA, -SIGMA))
    assert plus.abs().max() > 0
    torch.testing.assert_close(plus, -minus)


def test_shapes_are_compared_with_one_sigma_and_that_with_lora() -> None:
    rows = [{"heldout": 0.1, "train": 0.1, "rise": 0.0}, {"heldout": 0.2, "train": 0.1, "rise": 0.0}]
    better = [{**row, "heldout": row["heldout"] - 0.01} for row in rows]
    found = differences({arm: better if arm == "opposite pairs" else rows for arm in ARMS})
    assert found["opposite pairs - one sigma"]["heldout"]["mean"] == pytest.approx(-0.01)
    assert found["one sigma - LoRA"]["heldout"]["mean"] == 0
    assert found["opposite pairs - LoRA"]["heldout"]["mean"] == pytest.approx(-0.01)
    assert len(found) == 2 * len(ARMS) - 3


def test_the_page_says_which_shape_ends_better() -> None:
    rows = [{"heldout": 0.1 + seed, "train": 0.1, "rise": 0.0} for seed in range(3)]
    better = [{**row, "heldout": row["heldout"] - 0.01 - 1e-4 * seed} for seed, row in enumerate(rows)]
    figures = {arm: better if arm == "opposite pairs" else rows for arm in ARMS}
    one = {"figures": figures, "differences": differences(figures)}
    found = {"settings": {"sigma": SIGMA, "steps": 300}, "layers": dict.fromkeys(LAYERS, one)}
    ends = {tuple(line.strip("| ").split(" | ")[:3]): line.split(" | ")[-1] for line in section(found).splitlines()}
    for layers in LAYERS:
        assert ends[layers, "opposite pairs", "one sigma"] == "better |"
        assert ends[layers, "more at noisy timesteps", "one sigma"] == "no difference found |"
