"""Charts as PNG without a plotting library: lines with error bars, and filled contours side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette, which colour-blind readers can tell apart; the base comes first and is grey.
COLOURS = ("#7a7f87", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4b3f72")
# Viridis at equal steps (Smith and van der Walt, CC0): lightness grows evenly.
VIRIDIS = (
    "#440154",
    "#482878",
    "#3e4989",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6ece58",
    "#b5de2b",
    "#fde725",
)
_INK, _FAINT, _GRID, _PAPER = "#1f2328", "#59636e", "#e4e7eb", "white"
_SHARP = 3  # lines are drawn this much larger and scaled down, which smooths them
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 760, 460, 96, 62, 64, 24
_PANEL, _LEVELS = 300, 10


@dataclass(frozen=True)
class Line:
    """A series: equally many xs and ys, with the half-width of each y's interval if it has one."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float] = ()


def colour_of(index: int) -> str:
    """The colour of series `index`, the same in all charts."""
    return COLOURS[index % len(COLOURS)]


def line_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str, log: bool = False) -> Image.Image:
    """The lines over one pair of axes; with `log` both are logarithmic and values of at most 0 are left out."""
    lines = [_positive(line) for line in lines] if log else list(lines)
    xs = [x for line in lines for x in line.xs]
    ys = [y + sign * error for line in lines for y, error in _bars(line) for sign in (1, -1)]
    if not xs:
        xs, ys, log = [0.0, 1.0], [0.0, 1.0], False
    if log:
        ys = [y for y in ys if y > 0]
    across, up = _Axis(xs, log), _Axis(ys, log, margin=0.06)
    per_line = 3 if max(len(line.name) for line in lines) > 18 else 4
    top = _TOP + 22 * math.ceil(len(lines) / per_line)
    canvas = Image.new("RGB", (_WIDTH * _SHARP, (_HEIGHT + top) * _SHARP), _PAPER)
    box = (_LEFT, top, _WIDTH - _RIGHT, _HEIGHT + top - _BOTTOM)
    draw = _Pen(canvas)
    _draw_axes(draw, box, across, up)
    for index, line in enumerate(lines):
        colour = colour_of(index)
        width = 2.2 + 1.8 * (len(lines) - 1 - index) * (index > 0)  # a run that coincides with a later one still shows
        points = [
            (_at(x, across, box[0], box[2]), _at(y, up, box[3], box[1])) for x, y in zip(line.xs, line.ys, strict=True)
        ]
        for (x, _), (y, error) in zip(points, _bars(line), strict=True):
            if error and (not log or y > error):
                ends = [_at(y + sign * error, up, box[3], box[1]) for sign in (1, -1)]
                draw.line([(x, ends[0]), (x, ends[1])], colour, 1.4)
                for end in ends:
                    draw.line([(x - 4, end), (x + 4, end)], colour, 1.4)
        draw.line(points, colour, width)
        for point in points:
            draw.dot(point, colour, 2.5 + width / 2)
    for index, line in enumerate(lines):
        x = _LEFT + (index % per_line) * (_WIDTH - _LEFT - _RIGHT) / per_line
        y = 54 + 22 * (index // per_line)
        draw.line([(x, y), (x + 22, y)], colour_of(index), 3)
        draw.text((x + 28, y), line.name, 13, _INK, "lm")
    draw.text((_LEFT, 24), title, 19, _INK, "lm")
    draw.text(((box[0] + box[2]) / 2, _HEIGHT + top - 20), x_label, 14, _FAINT, "mm")
    draw.vertical(y_label, 14, _FAINT, (20, (box[1] + box[3]) / 2))
    return canvas.resize((_WIDTH, _HEIGHT + top), Image.Resampling.LANCZOS)


def surface_chart(surfaces: Sequence[tuple[str, Sequence[Sequence[float]]]], extent: float, title: str) -> Image.Image:
    """Filled contours of each named surface side by side, on one colour scale, with a bar that explains it."""
    values = [np.asarray(grid, dtype=np.float64) for _, grid in surfaces]
    low, high = min(float(grid.min()) for grid in values), max(float(grid.max()) for grid in values)
    high = high if high > low else low + 1e-12
    top, gap, left = 88, 26, 62
    width = left + len(values) * (_PANEL + gap) + 96
    height = top + _PANEL + 66
    canvas = Image.new("RGB", (width * _SHARP, height * _SHARP), _PAPER)
    draw = _Pen(canvas)
    for index, ((name, _), grid) in enumerate(zip(surfaces, values, strict=True)):
        x = left + index * (_PANEL + gap)
        side = _PANEL * _SHARP
        canvas.paste(_contours(grid, low, high, side), (x * _SHARP, top * _SHARP))
        draw.text((x + _PANEL / 2, top - 16), name, 15, _INK, "mm")
        middle = (x + _PANEL / 2, top + _PANEL / 2)
        draw.line([(middle[0] - 5, middle[1]), (middle[0] + 5, middle[1])], _PAPER, 2)
        draw.line([(middle[0], middle[1] - 5), (middle[0], middle[1] + 5)], _PAPER, 2)
        for share in (0.0, 0.5, 1.0):
            number = _number(extent * (2 * share - 1))
            draw.text((x + share * _PANEL, top + _PANEL + 14), number, 12, _FAINT, "mm")
            if index == 0:
                draw.text((x - 8, top + (1 - share) * _PANEL), number, 12, _FAINT, "rm")
        draw.text((x + _PANEL / 2, top + _PANEL + 36), "along direction 1", 13, _FAINT, "mm")
    draw.vertical("along direction 2", 13, _FAINT, (14, top + _PANEL / 2))
    x = left + len(values) * (_PANEL + gap)
    ramp = np.linspace(high, low, _PANEL * _SHARP)[:, None].repeat(16 * _SHARP, axis=1)
    canvas.paste(Image.fromarray(_coloured(ramp, low, high)), (x * _SHARP, top * _SHARP))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        draw.text((x + 22, top + (1 - share) * _PANEL), f"{low + share * (high - low):.4g}", 12, _FAINT, "lm")
    draw.text((x, top - 16), "loss", 13, _FAINT, "lm")
    draw.text((left, 26), title, 19, _INK, "lm")
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


class _Axis:
    """The range of an axis and its ticks."""

    def __init__(self, values: Sequence[float], log: bool, margin: float = 0.0) -> None:
        self.log = log
        low, high = (math.log10(found) if log else found for found in (min(values), max(values)))
        span = high - low or abs(high) or 1.0
        self.low, self.high = low - margin * span, high + margin * span
        if self.high == self.low:
            self.low, self.high = self.low - span / 2, self.high + span / 2
        self.ticks = self._log_ticks(sorted(set(values))) if log else self._even_ticks()

    def share(self, value: float) -> float:
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def _even_ticks(self) -> list[float]:
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, values: list[float]) -> list[float]:
        if len(values) <= 6:
            return values
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            ticks = [tick for tick in found if self.low <= math.log10(tick) <= self.high]
            if len(ticks) >= 3:
                return ticks
        return ticks


class _Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self, canvas: Image.Image) -> None:
        self._canvas = canvas
        self._draw = ImageDraw.Draw(canvas)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * _SHARP, y * _SHARP) for x, y in points]
        self._draw.line(scaled, colour, round(width * _SHARP))

    def dot(self, centre: tuple[float, float], colour: str, radius: float) -> None:
        x, y, r = (part * _SHARP for part in (*centre, radius))
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=_PAPER, width=_SHARP)

    def text(self, at: tuple[float, float], text: str, size: int, colour: str, anchor: str) -> None:
        font = ImageFont.load_default(size * _SHARP)
        self._draw.text((at[0] * _SHARP, at[1] * _SHARP), text, colour, font, anchor=anchor)

    def vertical(self, text: str, size: int, colour: str, centre: tuple[float, float]) -> None:
        font = ImageFont.load_default(size * _SHARP)
        _, _, width, height = self._draw.textbbox((0, 0), text, font)
        label = Image.new("RGB", (round(width) + 4, round(height) + 4), _PAPER)
        ImageDraw.Draw(label).text((2, 2), text, colour, font)
        label = label.rotate(90, expand=True)
        x, y = (round(part * _SHARP) for part in centre)
        self._canvas.paste(label, (x - label.width // 2, y - label.height // 2))


def _draw_axes(draw: _Pen, box: tuple[float, float, float, float], across: _Axis, up: _Axis) -> None:
    left, top, right, bottom = box
    for tick in across.ticks:
        x = _at(tick, across, left, right)
        draw.line([(x, top), (x, bottom)], _GRID, 1)
        draw.text((x, bottom + 14), _number(tick), 13, _FAINT, "mm")
    for tick in up.ticks:
        y = _at(tick, up, bottom, top)
        draw.line([(left, y), (right, y)], _GRID, 1)
        draw.text((left - 10, y), _number(tick), 13, _FAINT, "rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], _FAINT, 1)


def _contours(grid: np.ndarray, low: float, high: float, side: int) -> Image.Image:
    """A square of `side` pixels, the grid's first row at the bottom: colours with thin lines between the levels."""
    smooth = Image.fromarray(grid.astype(np.float32)[::-1].copy()).resize(
        (side, side), Image.Resampling.BICUBIC, box=_between_centres(grid.shape[0])
    )
    field = np.asarray(smooth, dtype=np.float64)
    colours = _coloured(field, low, high)
    level = np.floor((field - low) / (high - low) * _LEVELS)
    edge = np.zeros(level.shape, dtype=bool)
    for shift in range(1, _SHARP + 1):
        edge[:, shift:] |= level[:, shift:] != level[:, :-shift]
        edge[shift:] |= level[shift:] != level[:-shift]
    colours[edge] = (0.55 * colours[edge] + 0.45 * 255).astype(np.uint8)
    return Image.fromarray(colours)


def _between_centres(points: int) -> tuple[float, float, float, float]:
    """The part of a grid's picture whose corners are the outer points: pixels have their values at their centres."""
    return (0.5, 0.5, points - 0.5, points - 0.5)


def _coloured(field: np.ndarray, low: float, high: float) -> np.ndarray:
    stops = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in VIRIDIS], dtype=np.float64)
    share = np.clip((field - low) / (high - low), 0, 1) * (len(stops) - 1)
    places = np.arange(len(stops))
    return np.stack([np.interp(share, places, stops[:, band]) for band in range(3)], axis=-1).astype(np.uint8)


def _positive(line: Line) -> Line:
    errors = line.errors or [0.0] * len(line.ys)
    kept = [point for point in zip(line.xs, line.ys, errors, strict=True) if point[0] > 0 and point[1] > 0]
    return Line(line.name, *(tuple(point[place] for point in kept) for place in range(3)))


def _bars(line: Line) -> list[tuple[float, float]]:
    return list(zip(line.ys, line.errors or [0.0] * len(line.ys), strict=True))


def _at(value: float, axis: _Axis, start: float, end: float) -> float:
    return start + axis.share(value) * (end - start)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.0e}".replace("e-0", "e-") if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}"
