"""Two runs where they are alike: hand-made trajectories with known answers."""

from __future__ import annotations

import pytest

from flatlora_diffusion.compare.trajectory import TrajectoryPoint, losses_at_equal_loss, losses_at_equal_seconds


def run(*rows: tuple[float, float, float]) -> list[TrajectoryPoint]:
    """Points of (seconds, clean train loss, held-out loss)."""
    return [TrajectoryPoint(index * 10, *row) for index, row in enumerate(rows)]


FAST = run((0, 1.0, 1.0), (10, 0.8, 0.9), (20, 0.6, 0.7))
SLOW = run((0, 1.0, 1.0), (15, 0.9, 0.8), (30, 0.7, 0.75))


def test_at_the_clean_loss_that_both_reach() -> None:
    # Both reach 0.7: FAST half-way between its last points, SLOW at its end.
    assert losses_at_equal_loss(FAST, SLOW) == pytest.approx((0.8, 0.75))
    assert losses_at_equal_loss(SLOW, FAST) == pytest.approx((0.75, 0.8))


def test_after_the_seconds_of_the_shorter_run() -> None:
    # 20 s: the end of FAST, a third of the way from 15 s to 30 s of SLOW.
    assert losses_at_equal_seconds(FAST, SLOW) == pytest.approx((0.7, 0.8 + (0.75 - 0.8) / 3))


def test_a_loss_that_rises_again_counts_where_it_is_first_reached() -> None:
    back = run((0, 1.0, 1.0), (10, 0.5, 0.6), (20, 0.9, 0.3))
    assert losses_at_equal_loss(back, SLOW)[0] == pytest.approx(0.6 + (0.7 - 0.5) / 0.5 * 0.4)


def test_runs_that_learn_nothing_are_matched_at_their_start() -> None:
    worse = run((0, 1.0, 1.0), (10, 1.2, 1.3))
    assert losses_at_equal_loss(worse, FAST) == (1.0, 1.0)


def test_a_run_is_equal_to_itself() -> None:
    assert losses_at_equal_loss(FAST, FAST) == (0.7, 0.7)
    assert losses_at_equal_seconds(FAST, FAST) == (0.7, 0.7)
