"""How far images were learned, from losses made by hand: order, percentages, and marks beyond the spread alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flatlora_diffusion.evaluation.image_changes import highlights, image_changes

BEFORE = np.array([0.4, 0.1, 0.05, 0.01])


def event(step: int, losses: dict[str, Any], without: dict[str, Any] | None = None) -> dict[str, Any]:
    made = {"event": "image_losses", "step": step, "losses": {name: list(value) for name, value in losses.items()}}
    return made | ({} if without is None else {"without_caption": {name: list(x) for name, x in without.items()}})


def run(changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Two steps; the loss of each draw changes by the given factors."""
    return [
        event(0, {name: BEFORE for name in changes}),
        event(9, {name: BEFORE * np.array(factor) for name, factor in changes.items()}),
    ]


def ten(**changes: Any) -> dict[str, Any]:
    """Images that lose a fifth or a little more or less, and those of `changes`."""
    return {f"{index}.png": [0.8, 0.8, 0.8 + index / 1000, 0.8] for index in range(8)} | changes


def test_the_least_learned_image_comes_first_with_its_loss_in_percent_at_every_timestep_alike() -> None:
    found = image_changes([run({"a": [0.5] * 4, "b": [1.1] * 4, "c": [0.2, 0.2, 0.8, 0.8]})])
    assert found is not None
    assert found.steps == (0, 9)
    assert [(image.name, round(image.change, 6)) for image in found.images] == [("b", 0.1), ("a", -0.5), ("c", -0.6)]
    geometric = float(np.prod(BEFORE)) ** 0.25
    assert found.images[0].curve == pytest.approx((geometric, 1.1 * geometric))


def test_only_what_differs_by_more_than_the_spread_of_its_draws_is_marked() -> None:
    clear = image_changes([run(ten(late=[0.97, 0.99, 0.98, 0.96], soon=[0.5, 0.52, 0.51, 0.5]))])
    spread = image_changes([run(ten(late=[2.0, 0.5, 1.9, 0.6], soon=[0.2, 1.9, 0.1, 1.2]))])
    assert clear is not None
    assert spread is not None
    assert {image.name: image.mark for image in clear.images if image.mark} == {"late": "least", "soon": "most"}
    assert (clear.images[0].name, clear.images[-1].name) == ("late", "soon")
    assert not any(image.mark for image in spread.images)
    assert list(highlights(clear.images).values()) == [["late"], ["soon"]]
    assert highlights(spread.images) == {}


def test_equal_images_and_single_draws_get_no_mark() -> None:
    equal = image_changes([run({name: [0.7] * 4 for name in "abc"})])
    single = image_changes([[event(0, {"a": [0.1], "b": [0.1]}), event(5, {"a": [0.01], "b": [0.2]})]])
    assert equal is not None
    assert single is not None
    assert not any(image.mark for image in (*equal.images, *single.images))


def test_a_caption_that_raises_the_loss_is_doubtful_and_one_that_may_do_so_by_chance_is_not() -> None:
    factors = {"fits": [1.1, 1.3, 1.4, 1.2], "wrong": [0.7, 0.8, 0.75, 0.7], "unclear": [0.5, 1.4, 0.6, 1.3]}
    losses = dict.fromkeys(factors, BEFORE)
    without = {name: BEFORE * np.array(factor) for name, factor in factors.items()}
    found = image_changes([[event(0, losses, without), event(9, losses)]])
    assert found is not None
    assert {image.name for image in found.images if image.has_doubtful_caption} == {"wrong"}
    effects = {image.name: image.caption_effect for image in found.images}
    assert effects["wrong"] == pytest.approx(1 / np.prod(factors["wrong"]) ** 0.25 - 1)


def test_seeds_are_averaged_draw_by_draw_at_their_common_steps() -> None:
    first, second = run({"a": [0.5] * 4, "b": [0.9] * 4}), run({"a": [0.8] * 4, "b": [0.9] * 4})
    found = image_changes([[*first, event(20, {"a": BEFORE, "b": BEFORE})], second])
    assert found is not None
    assert found.steps == (0, 9)
    assert found.images[1].change == pytest.approx((0.5 * 0.8) ** 0.5 - 1)


def test_there_is_nothing_to_say_of_one_step_or_of_losses_that_are_not_finite() -> None:
    assert image_changes([]) is None
    assert image_changes([[event(0, {"a": BEFORE})]]) is None
    found = image_changes([[event(0, {"a": BEFORE, "b": BEFORE}), event(1, {"a": BEFORE, "b": [float("nan")] * 4})]])
    assert found is not None
    assert [image.name for image in found.images] == ["a"]
