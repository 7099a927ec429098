"""The loss around W' of some models as charts: PNG, and the surfaces as a page to turn."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path

from flatlora_diffusion.charts.lines import Chart, Line, surface_chart, titled_chart
from flatlora_diffusion.charts.palette import Look
from flatlora_diffusion.config import ConfigError, LandscapeConfig
from flatlora_diffusion.flatness.landscape import Landscape
from flatlora_diffusion.flatness.loss_surface import axis
from flatlora_diffusion.flatness.surface_page import can_write, write_surface_page

logger = logging.getLogger(__name__)

RESULT = "flatness.json"  # written before the others
_FILES = ("flatness.md", "rise.png", "slices.png", "strength.png", "surface.png", "surface.html")

Curve = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""xs, ys and the half-widths of the ys' intervals, none where there are none."""
_SURFACE = "Loss around W' along two random directions, the same for all"


def check_result_folder(folder: Path, setting: str) -> None:
    """Raises ConfigError for a folder where a result would replace files that are of no earlier result."""
    others = [name for name in _FILES if (folder / name).exists()]
    if others and not (folder / RESULT).is_file():
        raise ConfigError(
            f"{setting}={str(folder)!r} holds {', '.join(others)}, but no earlier result with a {RESULT}; "
            "give another folder"
        )


def write_landscape(
    folder: Path, config: LandscapeConfig, figures: Sequence[Landscape], looks: Sequence[Look]
) -> None:
    """Write the files of `landscape_charts` and, with plotly, surface.html: all `figures` on each."""
    for name, chart in landscape_charts(config, figures, looks).items():
        chart.save(folder / name)
    if can_write():
        at = axis(config.extent, config.surface_points)
        write_surface_page(folder / "surface.html", _surfaces(figures), at, _SURFACE)
    else:
        logger.warning("surface.html was left out: it needs the package plotly: pip install plotly")


def landscape_charts(config: LandscapeConfig, figures: Sequence[Landscape], looks: Sequence[Look]) -> dict[str, Chart]:
    """rise.png, slices.png and surface.png, each of all `figures`."""
    at = axis(config.extent, config.surface_points)
    title, x_label = "Expected rise of the loss under noise on W' (Eq. 7)", "sigma: noise relative to each row of W'"
    rises = lines_of(figures, looks, [_rise(one, config.sigmas) for one in figures])
    rise = titled_chart(rises, title, x_label, "rise of the loss", log=True)
    title = f"Loss around W', mean of {config.slice_directions} random directions"
    lines = lines_of(figures, looks, [_slice(one, at) for one in figures])
    slices = titled_chart(lines, title, "distance from W', relative to each row", "loss")
    surface = surface_chart(_surfaces(figures), config.extent, _SURFACE)
    return {"rise.png": rise, "slices.png": slices, "surface.png": surface}


def _surfaces(figures: Sequence[Landscape]) -> list[tuple[str, list[list[float]]]]:
    return [(one.name, one.surface) for one in figures]


def lines_of(figures: Sequence[Landscape], looks: Sequence[Look], curves: Sequence[Curve]) -> list[Line]:
    """A line for each of `figures`; of one look each has another shade."""
    shades = [list(looks[:place]).count(look) for place, look in enumerate(looks)]
    of_all = zip(figures, looks, shades, curves, strict=True)
    return [Line(one.name, look, *curve, shade=shade) for one, look, shade, curve in of_all]


def _rise(figures: Landscape, sigmas: Sequence[float]) -> Curve:
    rises = figures.rises["filter"]
    return sigmas, [rise.mean for rise in rises], [rise.error for rise in rises]


def _slice(figures: Landscape, at: Sequence[float]) -> Curve:
    """Mean and standard error over the directions."""
    columns = list(zip(*figures.slices, strict=True))
    errors = [statistics.stdev(column) / len(column) ** 0.5 for column in columns]
    return at, [statistics.mean(column) for column in columns], errors
