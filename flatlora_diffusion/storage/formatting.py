"""Text for messages and tables: numbers, intervals, slugs and the first line of an error."""

from __future__ import annotations

import math
import re

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message without a final full stop; the class name if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def slug(text: str, allowed: str = "") -> str:
    """Return `text` with `-` for each run of characters other than letters, digits, `.`, `_`, `-` and `allowed`."""
    return re.sub(rf"[^\w.{re.escape(allowed)}-]+", "-", text)


def count_text(number: int, noun: str) -> str:
    """Write a number with its noun in the singular or plural."""
    return f"{number} {noun}{'s' * (number != 1)}"


def is_known(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def figure(value: float | None, digits: int, signed: bool = False) -> str:
    """Format a number with `digits` decimals, in scientific notation if it would round to 0; an en dash for None."""
    if value is None or not is_known(value):
        return MISSING
    if value == 0:
        return "0"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = re.sub(r"e([+-])0*", r"e\1", f"{value:{'+' if signed else ''}.1e}")
    return text.replace("-", MINUS)


def interval(low: float | None, high: float | None, digits: int) -> str:
    """Format `[low, high]`; empty if either end is missing."""
    if not (is_known(low) and is_known(high)):
        return ""
    return f"[{figure(low, digits, signed=True)}, {figure(high, digits, signed=True)}]"
