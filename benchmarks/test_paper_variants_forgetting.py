"""LoRAs compared at equal forgetting, on made-up curves."""

from __future__ import annotations

import pytest

from benchmarks.paper_variants_figures import Row
from benchmarks.paper_variants_forgetting import STRENGTHS, at_equal_forgetting

BASE = {"report": 0.10, "flat": 0.05}


def row(arm: str, seed: int, gain: float, forgets: float) -> Row:
    """A run whose losses are straight lines of its strength."""
    losses = {f"{at:g}": {"report": 0.10 - gain * at, "flat": 0.05 + forgets * at} for at in STRENGTHS}
    return {"arm": arm, "seed": seed, "strengths": losses}


def test_two_arms_are_compared_where_the_first_forgets_what_the_second_does() -> None:
    rows = [row("lora", seed, gain=0.02, forgets=0.01) for seed in (0, 1)]
    # Twice the gain at three times the price: at the other's price two thirds of the gain of its own.
    rows += [row("sam", 0, gain=0.04, forgets=0.03), row("sam", 1, gain=0.06, forgets=0.03)]
    half, whole = at_equal_forgetting(rows, {"sam": "lora"}, BASE)
    assert (half["share"], whole["share"]) == (0.5, 1.0)
    assert whole["strength"] == pytest.approx(1 / 3)
    assert half["strength"] == pytest.approx(1 / 6)
    assert whole["report"]["differences"] == pytest.approx([0.02 - 0.04 / 3, 0.02 - 0.06 / 3])
    assert half["report"]["differences"] == pytest.approx([0.01 - 0.02 / 3, 0.01 - 0.03 / 3])


def test_an_arm_that_never_forgets_so_much_is_told_of() -> None:
    rows = [row("lora", 0, gain=0.02, forgets=0.01), row("sam", 0, gain=0.04, forgets=0.001)]
    with pytest.raises(ValueError, match=r"no strength up to 1.5 lets the flat icons' loss be 0.055"):
        at_equal_forgetting(rows, {"sam": "lora"}, BASE)
