"""One sentence about a finished comparison: how much two LoRAs differ, relative to what they change."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

from flatlora_diffusion.evaluation.paired_statistics import paired_difference

from ..widgets.messages import percent
from .comparison import Comparison
from .picture_cache import Picture

_NEAR, _ALIKE = 0.35, 0.8  # shares of what the LoRAs change in the base


def answer(comparison: Comparison, drawn: Mapping[Picture, Path]) -> tuple[str, str]:
    """(the answer, the evidence and its limits); empty unless two runs are compared.

    All pictures of the comparison must be in `drawn`.
    """
    if len(comparison.arms) != 2:
        return "", ""
    found = (_share([drawn[one] for one in row.pictures]) for row in comparison.rows())
    shares = [share for share in found if share is not None]
    if not shares:
        return "Neither LoRA changes these pictures.", "At this strength they are those of the base."
    share = paired_difference(shares, [0.0] * len(shares))
    one, two = comparison.arms
    first, second = (one.title, two.title) if one.title != two.title else (one.name, two.name)
    if share.mean < _NEAR:
        message = f"{first} and {second} draw nearly the same pictures here."
    elif share.mean < _ALIKE:
        message = f"{first} and {second} draw similar pictures here, with visible differences."
    else:
        message = f"{first} and {second} draw clearly different pictures here."
    sure = (
        f", with an uncertainty of {percent(share.margin or 0)}"
        if share.n > 1
        else ", from one picture, which tells little"
    )
    return message, (
        f"They differ from each other by {percent(share.mean)} of what they change in the base{sure}. "
        "The blind vote tells which one you prefer."
    )


def _share(row: Sequence[Path]) -> float | None:
    """The distance of the last two pictures relative to their mean distance to the first; None if both equal it."""
    base, first, second = row
    changed = (distance(first, base) + distance(second, base)) / 2
    return distance(first, second) / changed if changed else None


@lru_cache(maxsize=4096)
def distance(one: Path, other: Path) -> float:
    """The mean absolute pixel difference of two pictures, 0 to 255. A generated picture never changes."""
    with Image.open(one) as first, Image.open(other) as second:
        return statistics.mean(ImageStat.Stat(ImageChops.difference(first.convert("RGB"), second.convert("RGB"))).mean)
