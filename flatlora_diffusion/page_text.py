"""Pieces of a comparison's page: numbers in words, names of arms with their marks, tables and sections."""

from __future__ import annotations

import html
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Result = Mapping[str, Any]
Pair = Mapping[str, Any]
MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"

# How an arm is drawn everywhere: a colour and a line of the style sheet, and a marker.
_LOOKS = {"base": "base", "lora": "lora", "flat-lora": "flat"}
_FURTHER_LOOKS = ("third", "fourth")
MARKERS = {
    "base": '<rect x="-4" y="-4" width="8" height="8"/>',
    "lora": '<circle r="4.6"/>',
    "flat": '<path d="M0-6 6 0 0 6-6 0Z"/>',
    "third": '<path d="M0-5.6 5.4 4.4-5.4 4.4Z"/>',
    "fourth": '<path d="M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4Z"/>',
}


def escaped(value: object) -> str:
    """`value` as text that is safe inside of an element or an attribute."""
    return html.escape(str(value), quote=True)


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


def mean_of(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return statistics.fmean(values) if values else None


def mean_with_spread(values: Sequence[float], digits: int) -> str:
    """The mean and, from two values on, the standard deviation, as HTML."""
    text = figure(mean_of(values), digits)
    if len(values) < 2:
        return text
    return f"{text} <small>± {figure(statistics.stdev(values), digits)}</small>"


def values_of(by_seed: Mapping[str, Any], metric: str) -> list[float]:
    """The known values of a metric over the seeds."""
    found = [figures.get(metric) for figures in by_seed.values()]
    return [value for value in found if is_known(value)]


def main_arms(result: Result) -> list[str]:
    """The keys of the arms that are compared, without the nulls."""
    return [arm["key"] for arm in result["arms"] if arm["role"] == "arm"]


def arm_name(result: Result, key: str) -> str:
    """The name of an arm (or of the base) as the reader sees it, not escaped."""
    names = {arm["key"]: arm["name"] for arm in result["arms"]}
    return str(names.get(key, "Base" if key == "base" else key))


def look_of(result: Result, key: str) -> str:
    """The class of an arm's colour, line and marker; the nulls share one."""
    if key in _LOOKS:
        return _LOOKS[key]
    others = [arm for arm in main_arms(result) if arm not in _LOOKS]
    place = others.index(key) if key in others else len(_FURTHER_LOOKS)
    return _FURTHER_LOOKS[min(place, len(_FURTHER_LOOKS) - 1)]


def chip(result: Result, key: str) -> str:
    """An arm's name behind a piece of its line with its marker, as HTML."""
    look = look_of(result, key)
    mark = (
        f'<svg class="{look}" width="26" height="14" viewBox="-13 -7 26 14" aria-hidden="true">'
        f'<path class="line" d="M-13 0H13"/><g class="mark">{MARKERS[look]}</g></svg>'
    )
    return f'<span class="chip">{mark}{escaped(arm_name(result, key))}</span>'


def shown(value: object) -> str:
    """A setting's value as a reader writes it, not escaped."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return NOTHING
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def metric_of(result: Result, key: str) -> Mapping[str, Any]:
    """The description of a metric; one that only trajectories have is called by its key."""
    unnamed = {"key": key, "name": key.replace("_", " "), "better": None, "help": "", "digits": 4}
    return next((metric for metric in result["metrics"] if metric["key"] == key), unnamed)


def pairs_of(result: Result, metric: str) -> Iterator[Pair]:
    """The paired differences of a metric that have a mean."""
    return (pair for pair in result["paired"] if pair["metric"] == metric and is_known(pair["mean"]))


def headline(result: Result) -> Pair | None:
    """The pair that the first screen shows: the first metric's, of two arms, at their ends."""
    arms = main_arms(result)
    for metric in result["metrics"]:
        for pair in pairs_of(result, metric["key"]):
            if pair["matched"] in ("steps", "ends") and pair["arm"] in arms and pair["against"] in arms:
                return pair
    return None


class Section(NamedTuple):
    """A part of the page: its title and an explanation (HTML) beside the body (HTML); none without a body."""

    anchor: str
    title: str
    text: str
    body: str

    @property
    def html(self) -> str:
        """The part as HTML."""
        return (
            f'<section id="{self.anchor}"><header><h2>{escaped(self.title)}</h2><p>{self.text}</p></header>'
            f'<div class="body">{self.body}</div></section>'
        )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "", long: str | None = None) -> str:
    """A table of HTML cells; each row's first cell is its head. Narrow screens stack the cells behind their labels.

    The column named `long` has the whole width there.
    """
    kinds = {} if long is None else {long: "long"}
    body = "".join(f"<tr>{_cells(columns, row, kinds)}</tr>" for row in rows)
    return f'<table class="{kind}">{_head(columns)}<tbody>{body}</tbody></table>'


def charted_table(columns: Sequence[str], bodies: Sequence[str]) -> str:
    """A table of bodies of `charted_row`s, whose second column holds a chart."""
    return f'<table class="dots stack">{_head(columns)}{"".join(bodies)}</table>'


def charted_row(columns: Sequence[str], row: Sequence[str]) -> str:
    """A row of HTML cells, the second one a chart."""
    return f"<tr>{_cells(columns, row, {columns[1]: 'plot'})}</tr>"


def charted_axis(columns: Sequence[str], axis: str) -> str:
    """The row with the axis of the charts above it."""
    return f'<tr class="axis"><th></th><td class="plot">{axis}</td><td colspan="{len(columns) - 2}"></td></tr>'


def details(summary: str, body: str) -> str:
    """HTML that the reader unfolds."""
    return f"<details><summary>{escaped(summary)}</summary>{body}</details>"


def _head(columns: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{escaped(column)}</th>' for column in columns)
    return f"<thead><tr>{cells}</tr></thead>"


def _cells(columns: Sequence[str], row: Sequence[str], kinds: Mapping[str, str]) -> str:
    cells = [f'<th scope="row">{row[0]}</th>']
    for column, cell in zip(columns[1:], row[1:], strict=True):
        kind = f' class="{kinds[column]}"' if column in kinds else ""
        cells.append(f'<td{kind} data-label="{escaped(column)}">{cell}</td>')
    return "".join(cells)
