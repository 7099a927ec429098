"""How the pages of the paper's experiments write differences of losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCALE = 1e5  # losses differ in the fifth decimal
POINTS = 100  # of accuracies
UNIT = "in 10⁻⁵"
MINUS = "\N{MINUS SIGN}"


def interval(found: Mapping[str, Any], digits: int = 2, scale: float = SCALE) -> str:
    """The mean difference and its interval, which one seed does not have, nor have seeds that are alike."""
    mean, low, high = (found[key] for key in ("mean", "low", "high"))
    if low is None:
        return signed(mean, digits, scale)
    return f"{signed(mean, digits, scale)} [{signed(low, digits, scale)}, {signed(high, digits, scale)}]"


def signed(value: float, digits: int = 2, scale: float = SCALE) -> str:
    return f"{scale * value:+.{digits}f}".replace("-", MINUS)


def is_told(found: Mapping[str, Any]) -> bool:
    """Whether the interval leaves 0 out."""
    return found["low"] is not None and bool(found["low"] > 0 or found["high"] < 0)
