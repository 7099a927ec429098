"""A line chart of the losses of runs, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from .html import read_static

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 640, 270, 58, 34, 18
_TICKS = 5
CHART_CSS = read_static("loss_chart.css")
Curve = Sequence[tuple[int, float]]
"""(number of steps done, loss), by step."""


def loss_chart(curves: Mapping[str, Curve], colours: Mapping[str, str], title: str, text: str) -> str:
    """The curves by the names of their runs, as HTML; empty without any."""
    drawn = {name: curve for name, curve in curves.items() if curve}
    if not drawn:
        return ""
    points = [point for curve in drawn.values() for point in curve]
    last = max(1, max(step for step, _ in points))
    edges = low, high, _ = _round_range([loss for _, loss in points])

    def place(step: float, loss: float) -> tuple[float, float]:
        across = (_WIDTH - _LEFT - _EDGE) * step / last
        return _LEFT + across, _EDGE + (_HEIGHT - _BOTTOM - _EDGE) * (high - loss) / (high - low)

    lines = ""
    for name, curve in drawn.items():
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*one) for one in curve))
        lines += f'<path style="stroke:{colours[name]}" d="M{path}"><title>{escape(name)}</title></path>'
    message = "; ".join(f"{name}: {curve[-1][1]:.4f} after step {curve[-1][0]}" for name, curve in drawn.items())
    keys = "".join(f'<li><i style="background:{colours[name]}"></i>{escape(name)}</li>' for name in drawn)
    return (
        f'<figure class="fl-chart"><figcaption><b>{escape(title)}</b><p>{escape(text)}</p></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Loss by step. {escape(message)}">'
        f'{_grid(place, last, edges)}{lines}</svg><ul class="fl-keys">{keys}</ul></figure>'
    )


def _grid(place: Callable[[float, float], tuple[float, float]], last: int, edges: tuple[float, float, float]) -> str:
    low, high, every = edges
    digits = max(0, -math.floor(math.log10(every)))
    marks = []
    for number in range(round((high - low) / every) + 1):
        x, y = place(0, low + number * every)
        label = f"{low + number * every:.{digits}f}"
        marks.append(f'<line x1="{x}" x2="{_WIDTH - _EDGE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for step in range(0, last + 1, max(1, round(_round_distance(last)))):
        x, y = place(step, low)
        marks.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{step}</text>')
    return "".join(marks)


def _round_range(losses: Sequence[float]) -> tuple[float, float, float]:
    """(lower edge, upper edge, distance of the lines) in round numbers around all losses."""
    low, high = min(losses), max(losses)
    every = _round_distance((high - low) or abs(high) or 1.0)
    first = math.floor(low / every)
    return every * first, every * max(math.ceil(high / every), first + 1), every


def _round_distance(width: float) -> float:
    """The least round distance of which _TICKS are as wide."""
    power = 10.0 ** math.floor(math.log10(width / _TICKS))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * _TICKS >= width)
