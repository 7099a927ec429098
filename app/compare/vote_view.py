"""The handlers of the blind vote: questions, answers and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from flatlora_diffusion.config import ConfigError

from ..process.database import Choice
from ..widgets.html import data_url, empty_page, file_url, read_static
from ..widgets.messages import answer_card, note
from .blind_vote import BlindPair, answers_of, shuffled_pairs, tally, verdict
from .picture_cache import Picture
from .view import CompareView, Form

VOTE_CSS = read_static("empty.css", "vote.css")

VOTE_KEYS = read_static("vote.js")

BASE = "base"
_FIXED = "The number of votes is fixed in advance, since stopping at a lucky moment would bias the result."
NO_BALLOT = empty_page(
    "Vote without knowing which is which",
    "Draw the pictures side by side first, then choose two columns and press Start.",
)


@dataclass(frozen=True)
class Ballot:
    """The pairs of one blind vote between the arms called `first` and `second`; it ends when they are revealed."""

    pairs: tuple[BlindPair, ...]
    first: str
    second: str
    question: str
    voter: str
    is_revealed: bool = False


@dataclass(frozen=True)
class VotePage:
    """The page of a ballot; `is_open` while it expects an answer."""

    question: str
    count: str
    is_open: bool


class VoteView:
    """The blind votes about the pictures of `compare`."""

    def __init__(self, compare: CompareView) -> None:
        self._compare = compare
        self._store = compare.context.runs.database

    def start(self, form: Form, sides: tuple[str, str], question: str, order: int, voter: str) -> Ballot:
        """Start a vote between two columns, each `BASE` or a run id; earlier answers of `voter` count.

        Raises ConfigError for equal or unknown columns, and when no pair is drawn.
        """
        if sides[0] == sides[1]:
            raise ConfigError("the vote needs two different columns; choose another one")
        comparison = self._compare.comparison(form)
        columns = [BASE, *(arm.id for arm in comparison.arms)]
        if any(side not in columns for side in sides):
            raise ConfigError("that column is not in the comparison; choose its run above")
        names = ["Base", *(f"{arm.title} ({arm.name})" for arm in comparison.arms)]
        first, second = (columns.index(side) for side in sides)
        drawn = self._compare.drawn(comparison)
        rows = [(row.label, row.pictures[first], row.pictures[second]) for row in comparison.rows()]
        pairs = shuffled_pairs([row for row in rows if row[1] in drawn and row[2] in drawn], order)
        if not pairs:
            raise ConfigError("there is no pair to vote on; draw the pictures side by side first")
        return Ballot(tuple(pairs), names[first], names[second], question, voter)

    def vote(self, ballot: Ballot, choice: Choice) -> None:
        """Store the answer to the current pair, if any."""
        pair = self._next(ballot)
        if pair is not None:
            self._store.add_vote(pair.id, ballot.question, ballot.voter, choice)

    def page(self, ballot: Ballot) -> VotePage:
        """The next pair, or the revealed pairs at the end."""
        pair = self._next(ballot)
        files = self._compare.cache.find(picture for one in ballot.pairs for picture in one.sides)
        if pair is None:
            return VotePage(self._told(ballot, files), self._count(ballot, is_over=True), False)
        done = len(self._answers(ballot))
        bar = f'<progress aria-label="Pairs voted on" value="{done}" max="{len(ballot.pairs)}"></progress>'
        pictures = "".join(
            f'<img src="{_unnamed(files[picture])}" alt="{side} picture">'
            for side, picture in zip(("Left", "Right"), pair.sides, strict=True)
        )
        place = f"Pair {done + 1} of {len(ballot.pairs)}"
        question = f"<h3>{escape(ballot.question)}</h3><p>{place} · {escape(pair.label)}</p>"
        asked = f'<div class="fl-ask">{question}<div class="fl-two">{pictures}</div>{bar}</div>'
        return VotePage(asked, self._count(ballot, is_over=False), True)

    def _answers(self, ballot: Ballot) -> dict[str, Choice]:
        return answers_of(self._store.votes(ballot.question), ballot.pairs, ballot.voter)

    def _next(self, ballot: Ballot) -> BlindPair | None:
        answers = self._answers(ballot)
        return None if ballot.is_revealed else next((pair for pair in ballot.pairs if pair.id not in answers), None)

    def _count(self, ballot: Ballot, is_over: bool) -> str:
        count = tally(ballot.pairs, self._answers(ballot))
        pairs = len(ballot.pairs)
        if not is_over:
            return note(f"This vote has {pairs} pairs; the result follows after the last one.")
        numbers = f"{ballot.first}: {count.first} · {ballot.second}: {count.second} · ties: {count.ties}"
        if count.votes < pairs:
            return answer_card(f"No verdict: {count.votes} of {pairs} pairs were voted on.", f"{_FIXED} {numbers}")
        message, sure = verdict(count, ballot.first, ballot.second)
        return answer_card(message, f"{sure} {numbers}, after all {pairs} pairs, as fixed in advance.")

    def _told(self, ballot: Ballot, files: Mapping[Picture, Path]) -> str:
        answers = self._answers(ballot)
        return (
            f'<div class="fl-told">{"".join(_told_pair(pair, ballot, answers, files) for pair in ballot.pairs)}</div>'
        )


def _told_pair(pair: BlindPair, ballot: Ballot, answers: Mapping[str, Choice], files: Mapping[Picture, Path]) -> str:
    names = (ballot.second, ballot.first) if pair.is_swapped else (ballot.first, ballot.second)
    choice = answers.get(pair.id)
    figures = "".join(
        f'<figure class="{"fl-won" if choice == side else ""}">'
        f'<img src="{file_url(files[picture])}" alt="{escape(name)}">{escape(name)}</figure>'
        for side, picture, name in zip(("left", "right"), pair.sides, names, strict=True)
        if picture in files
    )
    choices = {
        "left": "you chose the left one",
        "right": "you chose the right one",
        "tie": "a tie",
        None: "not voted on",
    }
    return f"<section><p>{escape(pair.label)}: {choices[choice]}</p><div>{figures}</div></section>"


@lru_cache(maxsize=64)
def _unnamed(path: Path) -> str:
    """The pixels alone as a data URL, since a file's name and metadata would reveal its LoRA."""
    with Image.open(path) as image:
        return data_url(image.convert("RGB"), "PNG")
