"""Charts of one row for text and tables of the page: dots with an interval, an axis, a sample of a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flatlora_diffusion.charts.lines import (
    STEPS,
    Chart,
    Dot,
    PlainNumbers,
    add_marker,
    page_figure,
    sample_line,
    styled,
)
from flatlora_diffusion.charts.palette import INK, RULE, Look

_ROW, _AXIS, _SAMPLE = (344, 38), (344, 23), (26, 14)
_EDGE = 0.025

Limits = tuple[float, float]


def row_limits(values: Iterable[float]) -> Limits:
    """Return limits that include all `values` with a margin."""
    values = list(values) or [0.0, 1.0]
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def dot_row(limits: Limits, dots: Sequence[Dot], bar: Limits | None, zero: bool) -> Chart:
    """Draw a row of dots, with the interval `bar` in the look of the first; dots of seeds are lower."""
    height = 0.64 if any(dot.is_seed for dot in dots) else 0.5
    tooltips: list[str] = []
    with styled():
        figure = page_figure(*_ROW)
        axes = _row_axes(figure, limits)
        axes.set_axis_off()
        if zero:
            axes.axvline(0, color=INK.light, linewidth=1, linestyle=(0, (2, 3)))
        if bar is not None:
            axes.plot(bar, (height,) * 2, "|-", color=dots[0].colour, mec=dots[0].colour, lw=2.4, mew=2.4, ms=10)
        for dot in sorted(dots, key=lambda dot: not dot.is_seed):
            y, size = (0.26, 5.6) if dot.is_seed else (height, 10)
            add_marker(axes, (dot.value, y), dot, size, tooltips, dot.tooltip)
    return Chart(figure, tooltips)


def axis_row(limits: Limits) -> Chart:
    """Draw the axis below rows with these limits."""
    with styled():
        figure = page_figure(*_AXIS)
        axes = _row_axes(figure, limits)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set(position=("axes", 0.99), color=RULE.light)
        ticks = MaxNLocator(5, steps=STEPS).tick_values(*limits)
        margin = _EDGE * (limits[1] - limits[0])  # so that no number is cut off on a phone
        axes.set_xticks([tick for tick in ticks if limits[0] + margin < tick < limits[1] - margin])
        axes.xaxis.set_major_formatter(PlainNumbers())
        axes.tick_params("x", color=RULE.light, length=5, pad=2)
        axes.yaxis.set_visible(False)
        axes.grid(visible=False)
    return Chart(figure)


def sample(look: Look) -> Chart:
    """Draw a piece of a line with its marker, for legends."""
    with styled():
        figure = page_figure(*_SAMPLE)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 2), ylim=(0, 2))
        axes.set_axis_off()
        line = sample_line(look, look.tone.light)
        line.set_data((0, 1, 2), (1, 1, 1))
        line.set_markevery([1])
        axes.add_line(line)
    return Chart(figure)


def _row_axes(figure: Figure, limits: Limits) -> Axes:
    return figure.add_axes((0.01, 0, 0.98, 1), xlim=limits, ylim=(0, 1))
