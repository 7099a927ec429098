"""How the pages of the paper's experiments write differences of losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCALE = 1e5  # losses differ in the fifth decimal
UNIT = "in 10⁻⁵"
MINUS = "\N{MINUS SIGN}"


def interval(found: Mapping[str, Any], digits: int = 2) -> str:
    """The mean difference and its interval, which one seed does not have, nor have seeds that are alike."""
    mean = signed(found["mean"], digits)
    if found["low"] is None:
        return mean
    return f"{mean} [{signed(found['low'], digits)}, {signed(found['high'], digits)}]"


def signed(value: float, digits: int = 2) -> str:
    return f"{SCALE * value:+.{digits}f}".replace("-", MINUS)


def is_told(found: Mapping[str, Any]) -> bool:
    """Whether the interval leaves 0 out."""
    return found["low"] is not None and bool(found["low"] > 0 or found["high"] < 0)
