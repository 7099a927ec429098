"""Paired differences against scipy's paired test, and a simulation of their power."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from flatlora_diffusion.evaluation.paired_statistics import PairedDifference, paired_difference


def leaves_zero_out(difference: PairedDifference) -> bool:
    """Whether an interval shows a difference, as the verdict reads it."""
    return difference.low is not None and difference.high is not None and not difference.low <= 0 <= difference.high


@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_the_interval_is_that_of_the_paired_t_test(confidence: float) -> None:
    values, reference = [0.91, 0.87, 0.95, 0.90, 0.88], [0.93, 0.90, 0.94, 0.95, 0.93]
    result = paired_difference(values, reference, confidence)
    expected = stats.ttest_rel(values, reference).confidence_interval(confidence)
    assert result.mean == pytest.approx(np.mean(np.subtract(values, reference)))
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))
    assert result.n == 5
    assert not leaves_zero_out(result)


def test_a_difference_is_found_when_the_interval_leaves_zero_out() -> None:
    assert leaves_zero_out(paired_difference([1.0, 1.1, 0.9], [2.0, 2.1, 2.0]))
    assert leaves_zero_out(paired_difference([2.0, 2.1, 2.0], [1.0, 1.1, 0.9]))


def test_one_seed_has_no_interval() -> None:
    result = paired_difference([1.0], [2.0])
    assert (result.mean, result.low, result.high, result.detectable) == (-1.0, None, None, None)
    assert not leaves_zero_out(result)


def test_equal_values_differ_by_exactly_nothing() -> None:
    result = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (result.mean, result.low, result.high, result.detectable) == (0.0, 0.0, 0.0, 0.0)
    assert not leaves_zero_out(result)


@pytest.mark.parametrize(
    ("values", "reference"),
    [([5 / 8, 3 / 8], [4 / 8, 2 / 8]), ([4 / 6, 3 / 6], [3 / 6, 2 / 6])],
    ids=["exactly", "but for rounding"],
)
def test_differences_that_are_alike_show_no_spread_and_so_no_interval(
    values: list[float], reference: list[float]
) -> None:
    result = paired_difference(values, reference)
    assert result.mean == pytest.approx(values[0] - reference[0])
    assert (result.low, result.high, result.detectable) == (None, None, None)
    assert not leaves_zero_out(result)
    least = paired_difference([0.1 + 1e-12, 0.2 + 3e-12], [0.1, 0.2])
    assert least.low is not None, "a spread that is small is one"


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_detectable_difference_is_found_in_four_of_five_experiments(n: int) -> None:
    spread = paired_difference(list(np.arange(n, dtype=float)), [0.0] * n)
    error = float(np.std(np.arange(n), ddof=1)) / n**0.5
    assert spread.detectable is not None
    draws = np.random.default_rng(0).normal(spread.detectable / error / n**0.5, 1.0, size=(20_000, n))
    result = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert result.mean() == pytest.approx(0.8, abs=0.01)


def test_what_are_no_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 values"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="0 and 0"):
        paired_difference([], [])
