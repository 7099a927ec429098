"""Which checkpoint and strength is suggested, and why, for runs with a known end."""

from __future__ import annotations

import pytest

from flatlora_diffusion.compare.trajectory import TrajectoryPoint, advise


def run(*heldout: float, memorization: tuple[float, ...] = (), drift: tuple[float, ...] = ()) -> list[TrajectoryPoint]:
    return [
        TrajectoryPoint(
            index * 100,
            index * 10.0,
            1 - 0.1 * index,
            loss,
            drift[index] if drift else None,
            memorization[index] if memorization else None,
        )
        for index, loss in enumerate(heldout)
    ]


def test_a_run_whose_loss_rises_again_is_over_fitted_at_its_best_checkpoint() -> None:
    points = run(1.0, 0.8, 0.9, memorization=(0.5, 0.6, 0.7), drift=(0.0, 0.01, 0.02))
    found = advise(points, {1.0: 0.9, 0.5: 0.7})
    assert (found.checkpoint, found.strength, found.over_fit) == (100, 1.0, True)
    assert "From step 100 to 200 the held-out loss rose and lost 50%" in found.why
    assert "closer to training images (+0.100), a sign of copying" in found.why
    assert "changed by 0.0200, at step 100 by 0.0100" in found.why


def test_a_rise_without_copying_is_not_called_copying() -> None:
    found = advise(run(1.0, 0.8, 0.9, memorization=(0.5, 0.6, 0.6)), {})
    assert "no closer to training images (+0.000)" in found.why
    assert "a sign of copying" not in found.why


def test_a_run_that_still_improves_is_not_cut() -> None:
    found = advise(run(1.0, 0.9, 0.8), {0.5: 0.85, 1.0: 0.8, 1.5: 0.799})
    assert (found.checkpoint, found.strength, found.over_fit) == (200, 1.0, False)


def test_a_strength_is_suggested_if_it_helps() -> None:
    found = advise(run(1.0, 0.9, 0.8), {1.0: 0.8, 1.5: 0.75})
    assert (found.checkpoint, found.strength, found.over_fit) == (200, 1.5, False)
    assert "at strength 1.5 the gain over the base grows by 25%" in found.why


def test_a_run_worse_than_the_base_is_reported() -> None:
    found = advise(run(1.0, 1.1, 1.2), {1.0: 1.2})
    assert found.over_fit
    assert not advise(run(1.0, 1.0, 1.0), {1.0: 1.0}).over_fit, "it learned nothing"
    assert "No checkpoint has a lower held-out loss" in found.why


@pytest.mark.parametrize("lost", [0.0, 0.001])
def test_a_rise_within_noise_is_no_over_fitting(lost: float) -> None:
    assert not advise(run(1.0, 0.8, 0.8 + lost), {}).over_fit


def test_a_run_without_checkpoints_has_no_verdict_on_over_fitting() -> None:
    found = advise(run(1.0, 0.8), {})
    assert (found.checkpoint, found.over_fit) == (100, False)
    assert "no earlier checkpoint" in found.why
