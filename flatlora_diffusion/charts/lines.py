"""Charts by matplotlib in one style: PNG for folders and documents, SVG for the report's page.

They know nothing of results: series, dots and surfaces come with the look in which to draw them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from scipy.ndimage import zoom

from flatlora_diffusion.charts.palette import FAINT, INK, PAPER, RULE, Look
from flatlora_diffusion.charts.svg import hover, page_svg
from flatlora_diffusion.storage.atomic_io import atomic_write

_STYLE = {
    "text.color": INK.light,
    "text.parse_math": False,  # names of runs are no formulas
    "axes.labelcolor": FAINT.light,
    "axes.edgecolor": FAINT.light,
    "axes.titlecolor": INK.light,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-99, 99),  # no power of ten beside an axis
    "grid.color": RULE.light,
    "xtick.color": FAINT.light,
    "ytick.color": FAINT.light,
    "lines.scale_dashes": False,
    "lines.markeredgecolor": PAPER.light,
    "lines.markeredgewidth": 1.2,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "flatlora-diffusion",
}
_CHART = (414, 228)  # of the page, in its pixels
_PAGE_DPI, _PNG_DPI, _PNG_TEXT = 72, 150, 10  # matplotlib writes SVG in points
STEPS = (1, 2, 2.5, 5, 10)  # between the ticks of even axes, times a power of ten
_MOST_MARKS, _FEW, _SMALL = 12, 6, 1e-5
_LEGEND = 73  # letters beside each other, a sample of a line counted as 7
_EVEN = {"o": 1.1, "D": 0.86, "s": 0.88, "P": 1.2}  # markers of one size look alike in size
_PANEL, _LEVELS, _FINE = 2.5, 10, 161


@dataclass(frozen=True)
class Line:
    """A series of equally many xs and ys, with the half-width of each y's interval if it has one.

    is_seed: one of several runs, drawn thin and without marks. shade: the how manieth of its look it is.
    """

    name: str
    look: Look
    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float] = ()
    is_seed: bool = False
    shade: int = 0

    @property
    def colour(self) -> str:
        return self.look.colours[self.shade % len(self.look.colours)]


@dataclass(frozen=True)
class Dot:
    """A value in a row, with the words shown when the pointer rests on it; those of seeds are small."""

    value: float
    look: Look
    words: str
    is_seed: bool = False

    @property
    def colour(self) -> str:
        return self.look.tone.light


class Chart:
    """A drawn figure, which is not pyplot's: nothing outside of it knows it."""

    def __init__(self, figure: Figure, words: Sequence[str] = ()) -> None:
        self.figure = figure
        self._words = words

    def save(self, path: Path) -> None:
        """Write a PNG that is the same for the same data."""
        with styled(), atomic_write(path) as temporary:
            self.figure.savefig(temporary, format="png", dpi=_PNG_DPI, metadata={"Software": None})

    def svg(self, kind: str, label: str) -> Markup:
        """The chart for a page: an element of class `kind` in the page's own fonts and colours."""
        buffer = io.BytesIO()
        with styled():
            self.figure.savefig(buffer, format="svg", dpi=_PAGE_DPI, transparent=True)
        return page_svg(buffer.getvalue(), kind, label, self._words)


def line_chart(lines: Sequence[Line], x_label: str, zero: str = "") -> Chart:
    """The lines over one pair of axes, for the page; with `zero` 0 is included and its line bears these words."""
    words: list[str] = []
    with styled():
        figure = page_figure(*_CHART)
        axes = figure.add_axes((0.14, 0.19, 0.82, 0.76))
        _draw_lines(axes, lines, words)
        if zero:
            axes.axhline(0, color=INK.light, linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(
                zero, (1, 0), (0, 5), axes.get_yaxis_transform(), "offset points", ha="right", color=FAINT.light
            )
        axes.margins(0.02, 0.06)
        for axis, most in ((axes.xaxis, 6), (axes.yaxis, 5)):
            axis.set_major_locator(MaxNLocator(most, steps=STEPS))
            axis.set_major_formatter(PlainNumbers())
        axes.grid(visible=False, axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params("y", length=0, pad=8)
        axes.tick_params("x", color=RULE.light)
        axes.spines["bottom"].set_color(RULE.light)
        axes.set_xlabel(x_label, loc="right", color=INK.light)
    return Chart(figure, words)


def titled_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str, log: bool = False) -> Chart:
    """The lines with title and legend; with `log` both axes are logarithmic and values of at most 0 are left out."""
    lines = [_positive(line) for line in lines] if log else list(lines)
    words: list[str] = []
    across = min(3, max(1, _LEGEND // (7 + max(len(line.name) for line in lines))))
    with styled(_PNG_TEXT):
        figure = Figure(figsize=(7.2, 4.6 + 0.22 * math.ceil(len(lines) / across)))
        axes = figure.add_subplot()
        _draw_lines(axes, lines, words)
        if log and any(line.xs for line in lines):
            _make_log(axes, sorted({x for line in lines for x in line.xs}))
        axes.set_xlabel(x_label, labelpad=8)
        axes.set_ylabel(y_label, labelpad=8)
        samples = [sample_line(line.look, line.colour) for line in lines]
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": across, "borderaxespad": 0.2}
        legend = axes.legend(samples, [""] * len(lines), **above)
        for text, line in zip(legend.get_texts(), lines, strict=True):
            text.set_text(line.name)  # as a label a name that begins with _ would be left out
        _title(figure, title, at=0.02)
    return Chart(figure, words)


def surface_chart(surfaces: Sequence[tuple[str, Sequence[Sequence[float]]]], extent: float, title: str) -> Chart:
    """Filled contours of each named surface side by side, on one colour scale, with a bar that explains it."""
    grids = [np.asarray(grid, dtype=np.float64) for _, grid in surfaces]
    low, high = min(float(grid.min()) for grid in grids), max(float(grid.max()) for grid in grids)
    high = high if high > low else low + 1e-12
    at = np.linspace(-extent, extent, _FINE)
    with styled(_PNG_TEXT):
        figure = Figure(figsize=(_PANEL * len(grids) + 1.5, _PANEL + 1.1))
        panels = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
        for axes, (name, _), grid in zip(panels, surfaces, grids, strict=True):
            field = _smooth(grid).clip(low, high)
            image = axes.pcolormesh(at, at, field, cmap="viridis", vmin=low, vmax=high, shading="gouraud")
            image.set_rasterized(True)  # as an SVG it would be a triangle for each pair of points
            if float(grid.max()) > float(grid.min()):
                levels = np.linspace(low, high, _LEVELS + 1)[1:-1]
                axes.contour(at, at, field, levels, colors="white", alpha=0.45, linewidths=0.8)
            axes.plot(0, 0, "+", color="white", markeredgecolor="white", markersize=9, markeredgewidth=1.6)
            axes.set_title(name, fontsize=_PNG_TEXT)
            axes.set(xlabel="along direction 1", aspect="equal", xticks=(-extent, 0, extent))
            axes.set_yticks((-extent, 0, extent))
            axes.tick_params(length=0, pad=5)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("along direction 2")
        bar = figure.colorbar(image, cax=panels[-1].inset_axes((1.06, 0, 0.05, 1)), label="loss")
        bar.outline.set_visible(False)
        _title(figure, title, at=0.008)
    return Chart(figure)


def styled(size: float = 12) -> AbstractContextManager[None]:
    """matplotlib's own defaults with ours, whatever the user's matplotlibrc says; all is as before afterwards."""
    context: AbstractContextManager[None] = style.context({**_STYLE, "font.size": size}, after_reset=True)
    return context


def page_figure(width: float, height: float) -> Figure:
    """A figure of the page, in its pixels."""
    return Figure(figsize=(width / _PAGE_DPI, height / _PAGE_DPI), dpi=_PAGE_DPI)


def add_mark(axes: Axes, at: tuple[float, float], of: Line | Dot, size: float, words: list[str], text: str) -> None:
    """A mark of the look's kind, a faint round one for a seed, that shows `text` when the pointer rests on it."""
    marker, alpha = ("o", 0.65) if of.is_seed else (of.look.marker, 1)
    mark = Line2D(
        [at[0]], [at[1]], color=of.colour, alpha=alpha, marker=marker, markersize=size * _EVEN.get(marker, 1)
    )
    mark.set(zorder=4 if of.look.dashes else 4.1, gid=hover(words, text))
    axes.add_line(mark)


def sample_line(look: Look, colour: str) -> Line2D:
    """What legends show of a line."""
    size = 9 * _EVEN.get(look.marker, 1)
    return Line2D([], [], color=colour, linestyle=_dashes(look), linewidth=2.4, marker=look.marker, markersize=size)


class PlainNumbers(ScalarFormatter):
    """Ticks with as many decimals as their neighbours need, but for 0 and where none of them would show a digit."""

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        texts = super().format_ticks(list(values))
        if max(map(abs, values), default=1.0) < _SMALL:
            texts = [self.fix_minus(f"{value:.3g}") for value in values]
        return [text if value else "0" for value, text in zip(values, texts, strict=True)]


def _title(figure: Figure, title: str, at: float) -> None:
    figure.suptitle(title, x=at, ha="left", fontsize=13)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))


def _draw_lines(axes: Axes, lines: Sequence[Line], words: list[str]) -> None:
    """Whole lines below dashed ones, and of one look the first are the widest, so that none hides another."""
    for place, line in enumerate(lines):
        later = sum(not other.is_seed and other.look is line.look for other in lines[place + 1 :])
        front = 3 if line.look.dashes else 2.5
        if line.is_seed:
            axes.plot(line.xs, line.ys, color=line.colour, linewidth=1.1, alpha=0.5, zorder=2, gid="seed")
            continue
        drawn = {"color": line.colour, "linewidth": 2.4 + 1.6 * later, "linestyle": _dashes(line.look)}
        axes.plot(line.xs, line.ys, **drawn, gid="mean", zorder=front, solid_joinstyle="round")
        if any(line.errors):
            bars: dict[str, Any] = {"color": line.colour, "ecolor": line.colour, "elinewidth": 1.2, "capsize": 3.5}
            axes.errorbar(line.xs, line.ys, line.errors, fmt="none", **bars)
        marked = list(zip(line.xs, line.ys, strict=True))
        for x, y in marked[:: -math.ceil(len(marked) / _MOST_MARKS)] if marked else ():
            add_mark(axes, (x, y), line, 8 + later, words, f"{line.name}: {y:.5g} at {x:.5g}")


def _dashes(look: Look) -> Any:
    return (0, look.dashes) if look.dashes else "solid"


def _make_log(axes: Axes, xs: Sequence[float]) -> None:
    """Both axes logarithmic, with plain numbers at round places or, when they are few, at the xs."""
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    if len(xs) <= _FEW:
        axes.set_xticks(xs)
    low, high = axes.get_ylim()
    if sum(low <= tick <= high for tick in axes.get_yticks()) < 2:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))


def _positive(line: Line) -> Line:
    """The points that logarithmic axes can show; an interval that reaches 0 is left out."""
    errors = line.errors or [0.0] * len(line.ys)
    kept = [(x, y, e if e < y else 0.0) for x, y, e in zip(line.xs, line.ys, errors, strict=True) if x > 0 and y > 0]
    xs, ys, bars = (tuple(point[place] for point in kept) for place in range(3))
    return replace(line, xs=xs, ys=ys, errors=bars)


def _smooth(grid: np.ndarray) -> np.ndarray:
    """The grid with more points between its own, on a cubic spline, for contours without corners."""
    smooth: np.ndarray = zoom(grid, [_FINE / side for side in grid.shape], order=min(3, min(grid.shape) - 1))
    return smooth
