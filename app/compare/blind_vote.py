"""A blind vote between two arms: shuffled pairs without labels, the tally, and the verdict."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from ..process.database import Choice, Vote
from .picture_cache import Picture

QUESTIONS = ("Which one do you like better?", "Which follows the style better?")


@dataclass(frozen=True)
class BlindPair:
    """Two pictures of one prompt and seed; `is_swapped` if the second arm's picture is on the left."""

    label: str
    first: Picture
    second: Picture
    is_swapped: bool

    @property
    def sides(self) -> tuple[Picture, Picture]:
        """(left, right)."""
        return (self.second, self.first) if self.is_swapped else (self.first, self.second)

    @property
    def id(self) -> str:
        """The key of the vote in the database: both pictures in their order."""
        return ":".join(picture.key for picture in self.sides)


@dataclass(frozen=True)
class Tally:
    """Votes for the first arm, for the second, and ties."""

    first: int = 0
    second: int = 0
    ties: int = 0

    @property
    def votes(self) -> int:
        return self.first + self.second + self.ties

    @property
    def decided(self) -> int:
        return self.first + self.second


def shuffled_pairs(rows: Iterable[tuple[str, Picture, Picture]], seed: int) -> list[BlindPair]:
    """Shuffle the rows (label, first arm's picture, second arm's picture) and their sides by `seed`.

    Half of the pairs are swapped, rounded down. Equal pictures are left out, as there is nothing to choose.
    """
    distinct = [row for row in rows if row[1] != row[2]]
    draws = random.Random(seed)
    swaps = [place % 2 == 1 for place in range(len(distinct))]
    draws.shuffle(swaps)
    pairs = [BlindPair(*row, is_swapped) for row, is_swapped in zip(distinct, swaps, strict=True)]
    draws.shuffle(pairs)
    return pairs


def answers_of(votes: Iterable[Vote], pairs: Sequence[BlindPair], session: str) -> dict[str, Choice]:
    """The choices of one voter, by pair."""
    known = {pair.id for pair in pairs}
    return {vote.pair: vote.choice for vote in votes if vote.session == session and vote.pair in known}


def tally(pairs: Sequence[BlindPair], answers: Mapping[str, Choice]) -> Tally:
    """The count of `answers` by arm, sides taken back."""
    first = second = ties = 0
    for pair in pairs:
        choice = answers.get(pair.id)
        if choice is None:
            continue
        if choice == "tie":
            ties += 1
        elif (choice == "left") != pair.is_swapped:
            first += 1
        else:
            second += 1
    return Tally(first, second, ties)


def interval(wins: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `wins` in `count` (Wilson's); (0, 1) when nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    low, high = binomtest(wins, count).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def verdict(count: Tally, first: str, second: str) -> tuple[str, str]:
    """(result of a vote of fixed length between `first` and `second`, its uncertainty)."""
    if count.decided == 0:
        return f"You saw no difference between {first} and {second}.", "All pairs were ties."
    low, high = interval(count.second, count.decided)
    share = f"{second} was preferred in {count.second} of {count.decided} decided votes"
    sure = f"{share} ({count.second / count.decided:.0%}; 95 % interval {low:.0%} to {high:.0%})."
    if low > 0.5:
        return f"You prefer {second}.", sure
    if high < 0.5:
        return f"You prefer {first}.", sure
    return (
        f"Your votes show no difference between {first} and {second}.",
        f"{sure} That is not proof that there is none: a small difference needs many more votes.",
    )
