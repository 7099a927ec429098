"""The blind vote: shuffled sides, the count by arm, the interval, and an honest sentence."""

from __future__ import annotations

import pytest

from app.compare.blind_vote import Tally, answers_of, interval, shuffled_pairs, tally, verdict
from app.compare.picture_cache import Drawing, Picture
from app.process.database import Choice, Vote

DRAWING = Drawing(("--pretrained_model_name_or_path", "tiny"), 64, 25, 5.0, "no", "abc")


def rows(count: int) -> list[tuple[str, Picture, Picture]]:
    return [
        (f"row {seed}", Picture(DRAWING, "a fox", seed, "a" * 64, 1.0), Picture(DRAWING, "a fox", seed, "b" * 64, 1.0))
        for seed in range(count)
    ]


def test_half_of_the_pairs_are_swapped_and_the_seed_decides_which() -> None:
    pairs = shuffled_pairs(rows(20), 1)
    assert sum(pair.is_swapped for pair in pairs) == 10
    assert pairs == shuffled_pairs(rows(20), 1)
    assert pairs != shuffled_pairs(rows(20), 2)
    assert {pair.label for pair in pairs} == {f"row {seed}" for seed in range(20)}
    for pair in pairs:
        assert pair.sides == ((pair.second, pair.first) if pair.is_swapped else (pair.first, pair.second))


def test_equal_pictures_are_not_voted_on() -> None:
    same = Picture(DRAWING, "a fox", 0)
    assert shuffled_pairs([("row", same, same)], 1) == []


def test_the_count_takes_the_sides_back() -> None:
    pairs = shuffled_pairs(rows(10), 3)
    first_always: dict[str, Choice] = {pair.id: "right" if pair.is_swapped else "left" for pair in pairs}
    assert tally(pairs, first_always) == Tally(first=10)
    left_always: dict[str, Choice] = {pair.id: "left" for pair in pairs}
    assert tally(pairs, left_always) == Tally(first=5, second=5)
    assert tally(pairs, {pairs[0].id: "tie"}) == Tally(ties=1)


def test_only_this_voters_answers_to_these_pairs_in_this_order_count() -> None:
    pairs = shuffled_pairs(rows(4), 1)
    turned = ":".join(reversed(pairs[0].id.split(":")))
    votes = [
        Vote(pairs[0].id, "q", "me", "left", 0.0),
        Vote(pairs[1].id, "q", "you", "left", 0.0),
        Vote(turned, "q", "me", "right", 0.0),
    ]
    assert answers_of(votes, pairs, "me") == {pairs[0].id: "left"}


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (0, 0, 0.0, 1.0)],
)
def test_the_interval_is_wilsons(wins: int, count: int, low: float, high: float) -> None:
    assert interval(wins, count) == pytest.approx((low, high), abs=1e-6)


def test_the_sentence_says_no_difference_unless_the_interval_leaves_out_a_half() -> None:
    assert "show no difference" in verdict(Tally(first=2, second=8), "LoRA", "Flat-LoRA")[0]
    told, sure = verdict(Tally(first=1, second=11, ties=3), "LoRA", "Flat-LoRA")
    assert told == "You prefer Flat-LoRA."
    assert "11 of 12 decided votes (92%; 95 % interval 65% to 99%)" in sure
    assert verdict(Tally(first=11, second=1), "LoRA", "Flat-LoRA")[0] == "You prefer LoRA."
    assert "saw no difference" in verdict(Tally(ties=4), "LoRA", "Flat-LoRA")[0]
