"""Numbers as text: decimals, powers of ten, intervals, an en dash for what is not known."""

from __future__ import annotations

import math
import re

MINUS = "\N{MINUS SIGN}"


NOTHING = "\N{EN DASH}"


def is_known(value: object) -> bool:
    """Whether `value` is a number to show: not None, and finite."""
    return isinstance(value, int | float) and math.isfinite(value)


def figure(value: float | None, digits: int, signed: bool = False) -> str:
    """The number with `digits` decimals, with its power of ten if they would show 0, and an en dash for none."""
    if value is None or not is_known(value):
        return NOTHING
    if value == 0:
        return "0"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = re.sub(r"e([+-])0*", r"e\1", f"{value:{'+' if signed else ''}.1e}")
    return text.replace("-", MINUS)


def interval(low: float | None, high: float | None, digits: int) -> str:
    """`[low, high]`, or an empty text without an interval."""
    if not (is_known(low) and is_known(high)):
        return ""
    return f"[{figure(low, digits, signed=True)}, {figure(high, digits, signed=True)}]"
