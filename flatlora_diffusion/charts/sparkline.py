"""A curve the size of a word, for a cell of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import quoteattr

from markupsafe import Markup

_WIDTH, _HEIGHT, _EDGE = 96, 28, 3


def sparkline(
    xs: Sequence[float], ys: Sequence[float], limits: tuple[float, float], colour: str, label: str
) -> Markup:
    """Return the curve as an SVG element with a dot at its end.

    Args:
        limits: the lowest and highest y of all curves of the table.
        colour: a CSS colour.
        label: the text for screen readers.
    """
    low, high = limits
    across, down = (xs[-1] - xs[0]) or 1, (high - low) or 1
    points = [
        (
            _EDGE + (_WIDTH - 2 * _EDGE) * (x - xs[0]) / across,
            _EDGE + (_HEIGHT - 2 * _EDGE) * (high - y) / down,
        )
        for x, y in zip(xs, ys, strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return Markup(
        f'<svg class="spark" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label={quoteattr(label)}>'
        f'<polyline points="{line}" style="fill: none; stroke: {colour}; stroke-width: 2"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" style="fill: {colour}"/></svg>'
    )


def relative(curve: Sequence[float]) -> list[float]:
    """Return the curve divided by its first value."""
    return [value / curve[0] for value in curve]


def curve_limits(curves: Iterable[Sequence[float]]) -> tuple[float, float]:
    """Return the lowest and highest value of all curves relative to their first values."""
    values = [value for curve in curves for value in relative(curve)]
    return min(values), max(values)
