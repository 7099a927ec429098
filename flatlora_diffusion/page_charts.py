"""Charts as inline SVG, coloured by the page's style sheet: lines over axes, and rows of intervals and dots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flatlora_diffusion.page_text import MARKERS, MINUS, escaped

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 414, 264, 58, 14, 30, 46

_EDGE = 0.025


@dataclass(frozen=True)
class Series:
    """A line through (x, y) points in the look of an arm; the thin ones are single seeds."""

    name: str
    look: str
    points: Sequence[tuple[float, float]]
    thin: bool = False


@dataclass(frozen=True)
class Dot:
    """A value in a row, with the words shown when the pointer rests on it."""

    value: float
    look: str
    words: str
    small: bool = False


class Scale:
    """From values to shares of a width, with round ticks; some room is left at both ends."""

    def __init__(self, values: Iterable[float], margin: float = 0.06, ticks: int = 5) -> None:
        found = list(values) or [0.0, 1.0]
        low, high = min(found), max(found)
        span = high - low or abs(high) or 1.0
        self.low, self.high = low - margin * span, high + margin * span
        if self.high == self.low:
            self.low, self.high = self.low - span / 2, self.high + span / 2
        rough = (self.high - self.low) / ticks
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        self.ticks = [index * step for index in range(first, last + 1)]
        self._decimals = max(0, -math.floor(math.log10(step) + 1e-9)) + (step / power == 2.5)

    def share(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        """A tick as text."""
        if self._decimals > 6:
            return f"{tick:.1e}".replace("-", MINUS)
        return f"{tick:.{self._decimals}f}".replace("-", MINUS) if tick else "0"


def line_chart(series: Sequence[Series], y_label: str, x_label: str, zero: str = "") -> str:
    """The series over one pair of axes; with `zero` the value 0 is included and its line bears these words."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points] + ([0.0] if zero else [])
    across, up = Scale(xs, margin=0.02), Scale(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + across.share(x) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up.share(y) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for tick in up.ticks:
        y = at(xs[0], tick)[1]
        kind = "zero" if zero and tick == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{up.label(tick)}</text>')
    for tick in across.ticks:
        x, y = at(tick, ys[0])[0], _HEIGHT - _BOTTOM
        parts.append(f'<path class="grid" d="M{x:.1f} {y}v5"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 19}" text-anchor="middle">{across.label(tick)}</text>')
    if zero:
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{at(xs[0], 0.0)[1] - 6:.1f}" text-anchor="end">{escaped(zero)}</text>'
        )
    parts += [_line(line, [at(x, y) for x, y in line.points]) for line in series]
    parts.append(f'<text class="axis" x="2" y="14">{escaped(y_label)}</text>')
    parts.append(
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{escaped(x_label)}</text>'
    )
    label = escaped(f"{y_label} against {x_label}")
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def dot_row(scale: Scale, dots: Sequence[Dot], bar: tuple[float, float] | None, zero: bool, label: str) -> str:
    """One row of a chart in a table: dots, and the interval `bar` in the look of the first dot; as wide as its cell.

    The small dots lie below the others, so that none hides another.
    """
    parts = [f'<line class="zero" x1="{_percent(scale, 0.0)}" x2="{_percent(scale, 0.0)}" y2="100%"/>'] if zero else []
    large = "50%" if not any(dot.small for dot in dots) else "36%"
    if bar is not None:
        ends = f'x1="{_percent(scale, bar[0])}" x2="{_percent(scale, bar[1])}" y1="{large}" y2="{large}"'
        parts.append(f'<line class="bar {dots[0].look}" {ends}/>')
        for end in bar:
            parts.append(_placed(scale, end, large, f'<path class="bar {dots[0].look}" d="M0-5V5"/>'))
    for dot in sorted(dots, key=lambda dot: not dot.small):
        mark = '<circle r="2.8"/>' if dot.small else MARKERS[dot.look]
        kind = f"mark {dot.look}{' small' if dot.small else ''}"
        place = "74%" if dot.small else large
        parts.append(
            _placed(scale, dot.value, place, f'<g class="{kind}">{mark}<title>{escaped(dot.words)}</title></g>')
        )
    return f'<svg class="row" role="img" aria-label="{escaped(label)}">{"".join(parts)}</svg>'


def axis_row(scale: Scale) -> str:
    """The axis below rows of one scale."""
    parts = ['<line class="rule" x2="100%" y1=".5" y2=".5"/>']
    for tick in scale.ticks:
        place = _percent(scale, tick)
        parts.append(f'<line class="rule" x1="{place}" x2="{place}" y2="5"/>')
        if _EDGE < scale.share(tick) < 1 - _EDGE:  # else it could leave a phone's screen
            parts.append(f'<text x="{place}" y="18" text-anchor="middle">{scale.label(tick)}</text>')
    return f'<svg class="ticks" aria-hidden="true">{"".join(parts)}</svg>'


def _line(line: Series, places: Sequence[tuple[float, float]]) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line{" thin" if line.thin else ""}" d="{path}"/>']
    if not line.thin:
        marked = list(zip(places, line.points, strict=True))
        for (x, y), (x_value, y_value) in marked[:: -math.ceil(len(marked) / 12)]:
            words = escaped(f"{line.name}: {y_value:.5g} at {x_value:.5g}")
            mark = f'<g class="mark" transform="translate({x:.1f} {y:.1f}) scale(.8)">{MARKERS[line.look]}'
            parts.append(f"{mark}<title>{words}</title></g>")
    return f'<g class="{line.look}">{"".join(parts)}</g>'


def _placed(scale: Scale, value: float, y: str, content: str) -> str:
    return f'<svg class="at" x="{_percent(scale, value)}" y="{y}">{content}</svg>'


def _percent(scale: Scale, value: float) -> str:
    return f"{100 * scale.share(value):.2f}%"
