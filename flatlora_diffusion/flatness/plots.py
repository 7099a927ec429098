"""Charts of the loss around W': PNG files, and an interactive page of the surfaces."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path

from flatlora_diffusion.charts.lines import Chart, Line, surface_chart, titled_chart
from flatlora_diffusion.charts.palette import Look
from flatlora_diffusion.config import ConfigError, LandscapeConfig
from flatlora_diffusion.flatness.landscape import Landscape, axis
from flatlora_diffusion.flatness.surface_page import can_write, write_surface_page

logger = logging.getLogger(__name__)

RESULT = "flatness.json"  # written before the other files
_FILES = ("flatness.md", "rise.png", "slices.png", "strength.png", "surface.png", "surface.html")

Curve = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""xs, ys and the half-widths of the intervals of ys, which may be empty."""
_SURFACE = "Loss around W' along two random directions, the same for all"


def check_result_folder(folder: Path, setting: str) -> None:
    """Raise ConfigError for a folder with files that would be overwritten but are not of an earlier result."""
    names = [name for name in _FILES if (folder / name).exists()]
    if names and not (folder / RESULT).is_file():
        raise ConfigError(
            f"{setting}={str(folder)!r} holds {', '.join(names)} without an earlier {RESULT}; give another folder"
        )


def write_landscape(
    folder: Path, config: LandscapeConfig, figures: Sequence[Landscape], looks: Sequence[Look]
) -> None:
    """Write the charts of `landscape_charts` and, with plotly, surface.html."""
    for name, chart in landscape_charts(config, figures, looks).items():
        chart.save(folder / name)
    if can_write():
        at = axis(config.extent, config.surface_points)
        write_surface_page(folder / "surface.html", _surfaces(figures), at, _SURFACE)
    else:
        logger.warning("surface.html was not written: it needs the package plotly: pip install plotly")


def landscape_charts(config: LandscapeConfig, figures: Sequence[Landscape], looks: Sequence[Look]) -> dict[str, Chart]:
    """Create rise.png, slices.png and surface.png, each with all `figures`."""
    at = axis(config.extent, config.surface_points)
    title, x_label = "Expected loss increase under noise on W' (Eq. 7)", "sigma: noise relative to each row of W'"
    rises = lines_of(figures, looks, [_rise(model, config.sigmas) for model in figures])
    rise = titled_chart(rises, title, x_label, "loss increase", log=True)
    title = f"Loss around W', mean of {config.slice_directions} random directions"
    lines = lines_of(figures, looks, [_slice(model, at) for model in figures])
    slices = titled_chart(lines, title, "distance from W', relative to each row", "loss")
    surface = surface_chart(_surfaces(figures), config.extent, _SURFACE)
    return {"rise.png": rise, "slices.png": slices, "surface.png": surface}


def _surfaces(figures: Sequence[Landscape]) -> list[tuple[str, list[list[float]]]]:
    return [(model.name, model.surface) for model in figures]


def lines_of(figures: Sequence[Landscape], looks: Sequence[Look], curves: Sequence[Curve]) -> list[Line]:
    """Return a line for each of `figures`, with different shades of the same look."""
    shades = [list(looks[:index]).count(look) for index, look in enumerate(looks)]
    rows = zip(figures, looks, shades, curves, strict=True)
    return [Line(model.name, look, *curve, shade=shade) for model, look, shade, curve in rows]


def _rise(figures: Landscape, sigmas: Sequence[float]) -> Curve:
    rises = figures.rises["filter"]
    return sigmas, [rise.mean for rise in rises], [rise.error for rise in rises]


def _slice(figures: Landscape, at: Sequence[float]) -> Curve:
    """Return mean and standard error over the directions."""
    columns = list(zip(*figures.slices, strict=True))
    errors = [statistics.stdev(column) / len(column) ** 0.5 for column in columns]
    return at, [statistics.mean(column) for column in columns], errors
