"""The loss curves of runs as inline SVG, each in the colour of its method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import accumulate

import gradio as gr

from ..context import AppContext
from ..runs.runs import Run
from .html import read_static
from .run_cards import method_name
from .theme import NO_METHOD, SHADES

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 640, 270, 58, 34, 18
_TICKS = 5
_MAX_POINTS = 300
_LOSS_TEXT = "The training loss should fall, then level out."
_PAIR_TEXT = "Both runs of a pair see the same images and noise, so their curves may overlap."
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


def loss_curves(context: AppContext, runs: list[Run]) -> gr.HTML:
    """The chart of all runs that have a loss, each in its method's colour; hidden without a loss."""
    losses = {run.name: smooth(context.runs.events(run.id).losses()) for run in runs}
    curves = {name: [(step + 1, loss) for step, loss in points] for name, points in losses.items()}
    text = f"{_LOSS_TEXT} {_PAIR_TEXT}" if len(runs) > 1 else _LOSS_TEXT
    chart = loss_chart(curves, run_colours(runs), "Loss, smoothed", text)
    return gr.HTML(chart, visible=bool(chart))


def run_colours(runs: list[Run]) -> dict[str, str]:
    """The colour of each run by its name: that of its method, in another shade for a second run of the method."""
    colours: dict[str, str] = {}
    for run in runs:
        shades = SHADES.get(method_name(run.method), (NO_METHOD,))
        free = [shade for shade in shades if shade not in colours.values()]
        colours.setdefault(run.name, (free or shades)[0])
    return colours


def smooth(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """(step, loss averaged over a tenth of the run), for at most _MAX_POINTS steps."""
    reach = max(1, len(losses) // 10) // 2
    sums = [0.0, *accumulate(loss for _, loss in losses)]
    every = -(-len(losses) // _MAX_POINTS) or 1
    means = []
    for place in range(0, len(losses), every):
        first, last = max(0, place - reach), min(len(losses), place + reach + 1)
        means.append((losses[place][0], (sums[last] - sums[first]) / (last - first)))
    return means
