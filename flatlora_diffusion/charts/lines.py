"""Charts by matplotlib in a common style: PNG for folders and documents, SVG for the report's page."""

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
from flatlora_diffusion.charts.svg import add_tooltip, page_svg
from flatlora_diffusion.storage.atomic_io import atomic_write

_STYLE = {
    "text.color": INK.light,
    "text.parse_math": False,  # names of runs are not formulas
    "axes.labelcolor": FAINT.light,
    "axes.edgecolor": FAINT.light,
    "axes.titlecolor": INK.light,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-99, 99),  # no scientific notation
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
_CHART = (414, 228)  # pixels of the page
_PAGE_DPI, _PNG_DPI, _PNG_TEXT = 72, 150, 10  # matplotlib's unit in SVG is the point
STEPS = (1, 2, 2.5, 5, 10)  # distances of ticks on linear axes, times a power of ten
_MAX_MARKERS, _FEW_TICKS, _SMALL = 12, 6, 1e-5
_LEGEND = 73  # characters of a legend's row, where a sample of a line counts as 7
_MARKER_SCALE = {"o": 1.1, "D": 0.86, "s": 0.88, "P": 1.2}  # for equal apparent size
_PANEL, _LEVELS, _FINE = 2.5, 10, 161  # inches; contour levels; points of a smoothed side


@dataclass(frozen=True)
class Line:
    """A series of points.

    errors: half-widths of the intervals of ys, or empty.
    is_seed: one of several runs, drawn thin and without markers.
    shade: index of the colour in the look.
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
    """A value in a row with its tooltip; dots of single seeds are small."""

    value: float
    look: Look
    tooltip: str
    is_seed: bool = False

    @property
    def colour(self) -> str:
        return self.look.tone.light


class Chart:
    """A figure, independent of pyplot's global state."""

    def __init__(self, figure: Figure, tooltips: Sequence[str] = ()) -> None:
        self.figure = figure
        self._tooltips = tooltips

    def save(self, path: Path) -> None:
        """Write a PNG, which is deterministic."""
        with styled(), atomic_write(path) as temporary:
            self.figure.savefig(temporary, format="png", dpi=_PNG_DPI, metadata={"Software": None})

    def svg(self, kind: str, label: str) -> Markup:
        """Return an SVG element of class `kind` with the fonts and colours of the page."""
        buffer = io.BytesIO()
        with styled():
            self.figure.savefig(buffer, format="svg", dpi=_PAGE_DPI, transparent=True)
        return page_svg(buffer.getvalue(), kind, label, self._tooltips)


def line_chart(lines: Sequence[Line], x_label: str, zero: str = "") -> Chart:
    """Draw lines for the page; with `zero` the y axis includes a line at 0 with this label."""
    tooltips: list[str] = []
    with styled():
        figure = page_figure(*_CHART)
        axes = figure.add_axes((0.14, 0.19, 0.82, 0.76))
        _draw_lines(axes, lines, tooltips)
        if zero:
            axes.axhline(0, color=INK.light, linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(
                zero, (1, 0), (0, 5), axes.get_yaxis_transform(), "offset points", ha="right", color=FAINT.light
            )
        axes.margins(0.02, 0.06)
        for axis, bins in ((axes.xaxis, 6), (axes.yaxis, 5)):
            axis.set_major_locator(MaxNLocator(bins, steps=STEPS))
            axis.set_major_formatter(PlainNumbers())
        axes.grid(visible=False, axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params("y", length=0, pad=8)
        axes.tick_params("x", color=RULE.light)
        axes.spines["bottom"].set_color(RULE.light)
        axes.set_xlabel(x_label, loc="right", color=INK.light)
    return Chart(figure, tooltips)


def titled_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str, log: bool = False) -> Chart:
    """Draw lines with title and legend; with `log` both axes are logarithmic and values up to 0 are omitted."""
    lines = [_positive(line) for line in lines] if log else list(lines)
    tooltips: list[str] = []
    columns = min(3, max(1, _LEGEND // (7 + max(len(line.name) for line in lines))))
    with styled(_PNG_TEXT):
        figure = Figure(figsize=(7.2, 4.6 + 0.22 * math.ceil(len(lines) / columns)))
        axes = figure.add_subplot()
        _draw_lines(axes, lines, tooltips)
        if log and any(line.xs for line in lines):
            _make_log(axes, sorted({x for line in lines for x in line.xs}))
        axes.set_xlabel(x_label, labelpad=8)
        axes.set_ylabel(y_label, labelpad=8)
        samples = [sample_line(line.look, line.colour) for line in lines]
        placement: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": columns}
        legend = axes.legend(samples, [""] * len(lines), borderaxespad=0.2, **placement)
        for text, line in zip(legend.get_texts(), lines, strict=True):
            text.set_text(line.name)  # a label that starts with _ would be omitted
        _title(figure, title, x=0.02)
    return Chart(figure, tooltips)


def surface_chart(surfaces: Sequence[tuple[str, Sequence[Sequence[float]]]], extent: float, title: str) -> Chart:
    """Draw filled contours of the named surfaces side by side, on a common colour scale with a colour bar."""
    grids = [np.asarray(grid, dtype=np.float64) for _, grid in surfaces]
    low, high = min(float(grid.min()) for grid in grids), max(float(grid.max()) for grid in grids)
    high = high if high > low else low + 1e-12
    ticks = np.linspace(-extent, extent, _FINE)
    with styled(_PNG_TEXT):
        figure = Figure(figsize=(_PANEL * len(grids) + 1.5, _PANEL + 1.1))
        panels = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
        for axes, (name, _), grid in zip(panels, surfaces, grids, strict=True):
            field = _smooth(grid).clip(low, high)
            image = axes.pcolormesh(ticks, ticks, field, cmap="viridis", vmin=low, vmax=high, shading="gouraud")
            image.set_rasterized(True)  # in SVG each cell would be a triangle
            if float(grid.max()) > float(grid.min()):
                levels = np.linspace(low, high, _LEVELS + 1)[1:-1]
                axes.contour(ticks, ticks, field, levels, colors="white", alpha=0.45, linewidths=0.8)
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
        _title(figure, title, x=0.008)
    return Chart(figure)


def styled(size: float = 12) -> AbstractContextManager[None]:
    """Apply our style on matplotlib's defaults, independent of the user's matplotlibrc, and restore it afterwards."""
    context: AbstractContextManager[None] = style.context({**_STYLE, "font.size": size}, after_reset=True)
    return context


def page_figure(width: float, height: float) -> Figure:
    """Create a figure for the page, with sizes in its pixels."""
    return Figure(figsize=(width / _PAGE_DPI, height / _PAGE_DPI), dpi=_PAGE_DPI)


def add_marker(
    axes: Axes, point: tuple[float, float], item: Line | Dot, size: float, tooltips: list[str], tooltip: str
) -> None:
    """Draw a marker of the item's look with a tooltip; a faint dot for a seed."""
    marker, alpha = ("o", 0.65) if item.is_seed else (item.look.marker, 1)
    size *= _MARKER_SCALE.get(marker, 1)
    line = Line2D([point[0]], [point[1]], color=item.colour, alpha=alpha, marker=marker, markersize=size)
    line.set(zorder=4 if item.look.dashes else 4.1, gid=add_tooltip(tooltips, tooltip))
    axes.add_line(line)


def sample_line(look: Look, colour: str) -> Line2D:
    """Return the sample of a line for legends."""
    size = 9 * _MARKER_SCALE.get(look.marker, 1)
    return Line2D([], [], color=colour, linestyle=_dashes(look), linewidth=2.4, marker=look.marker, markersize=size)


class PlainNumbers(ScalarFormatter):
    """Ticks with equally many decimals, except for 0 and for very small values."""

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        texts = super().format_ticks(list(values))
        if max(map(abs, values), default=1.0) < _SMALL:
            texts = [self.fix_minus(f"{value:.3g}") for value in values]
        return [text if value else "0" for value, text in zip(values, texts, strict=True)]


def _title(figure: Figure, title: str, x: float) -> None:
    figure.suptitle(title, x=x, ha="left", fontsize=13)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))


def _draw_lines(axes: Axes, lines: Sequence[Line], tooltips: list[str]) -> None:
    """Draw solid lines below dashed lines, and earlier lines of a look wider, so that no line hides another."""
    for index, line in enumerate(lines):
        later = sum(not other.is_seed and other.look is line.look for other in lines[index + 1 :])
        zorder = 3 if line.look.dashes else 2.5
        if line.is_seed:
            axes.plot(line.xs, line.ys, color=line.colour, linewidth=1.1, alpha=0.5, zorder=2, gid="seed")
            continue
        line_style = {"color": line.colour, "linewidth": 2.4 + 1.6 * later, "linestyle": _dashes(line.look)}
        axes.plot(line.xs, line.ys, **line_style, gid="mean", zorder=zorder, solid_joinstyle="round")
        if any(line.errors):
            bars: dict[str, Any] = {"color": line.colour, "ecolor": line.colour, "elinewidth": 1.2, "capsize": 3.5}
            axes.errorbar(line.xs, line.ys, line.errors, fmt="none", **bars)
        points = list(zip(line.xs, line.ys, strict=True))
        for x, y in points[:: -math.ceil(len(points) / _MAX_MARKERS)] if points else ():
            add_marker(axes, (x, y), line, 8 + later, tooltips, f"{line.name}: {y:.5g} at {x:.5g}")


def _dashes(look: Look) -> Any:
    return (0, look.dashes) if look.dashes else "solid"


def _make_log(axes: Axes, xs: Sequence[float]) -> None:
    """Make both axes logarithmic, with plain numbers at round values, or at the xs if these are few."""
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    if len(xs) <= _FEW_TICKS:
        axes.set_xticks(xs)
    low, high = axes.get_ylim()
    if sum(low <= tick <= high for tick in axes.get_yticks()) < 2:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))


def _positive(line: Line) -> Line:
    """Return the points with positive coordinates, without intervals that reach 0."""
    errors = line.errors or [0.0] * len(line.ys)
    points = [(x, y, e if e < y else 0.0) for x, y, e in zip(line.xs, line.ys, errors, strict=True) if x > 0 and y > 0]
    xs, ys, bars = (tuple(point[axis] for point in points) for axis in range(3))
    return replace(line, xs=xs, ys=ys, errors=bars)


def _smooth(grid: np.ndarray) -> np.ndarray:
    """Interpolate the grid by cubic splines, for smooth contours."""
    smooth: np.ndarray = zoom(grid, [_FINE / side for side in grid.shape], order=min(3, min(grid.shape) - 1))
    return smooth
