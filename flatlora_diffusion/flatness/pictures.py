"""The flatness figures as charts: PNG in the colours of the methods, and the surface as a page to turn."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatlora_diffusion.charts.lines import Line, surface_chart, titled_chart
from flatlora_diffusion.charts.palette import BASE, METHODS, THIRD
from flatlora_diffusion.config import FlatnessConfig
from flatlora_diffusion.flatness.figures import HELDOUT, IMAGES, TRAIN, FlatnessFigures
from flatlora_diffusion.flatness.surface_page import can_write, write_surface_page

logger = logging.getLogger(__name__)

Curve = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""xs, ys and the half-widths of the ys' intervals, none where there are none."""


def write_charts(
    folder: Path, config: FlatnessConfig, figures: Sequence[FlatnessFigures], facts: Mapping[str, Any]
) -> None:
    """Write rise.png, slices.png, strength.png, surface.png and, with plotly, surface.html.

    `figures` has the base's first; `facts` the axis of slices and surfaces, and each run's method by its name.
    """
    looks = [BASE, *(METHODS.get(facts["runs"][run.name]["method"], THIRD) for run in figures[1:])]
    shades = [looks[:place].count(look) for place, look in enumerate(looks)]

    def lines(curves: Iterable[Curve]) -> list[Line]:
        of_all = zip(figures, looks, shades, curves, strict=True)
        return [Line(one.name, look, *curve, shade=shade) for one, look, shade, curve in of_all]

    title, x_label = "Expected rise of the loss under noise on W' (Eq. 7)", "sigma: noise relative to each row of W'"
    rises = lines(_rise(one, config.sigmas) for one in figures)
    titled_chart(rises, title, x_label, "rise of the loss", log=True).save(folder / "rise.png")
    title = f"Loss around W', mean of {config.slice_directions} random directions"
    slices = lines(_slice(one, facts["axis"]) for one in figures)
    titled_chart(slices, title, "distance from W', relative to each row", "loss").save(folder / "slices.png")
    kind = HELDOUT if HELDOUT in figures[0].losses else TRAIN
    title = f"Loss by strength of the LoRA, {IMAGES[kind]}"
    strengths = lines(_strength(one, figures[0], kind) for one in figures)
    titled_chart(strengths, title, "strength", "loss").save(folder / "strength.png")
    title = "Loss around W' along two random directions, the same for all"
    surfaces = [(one.name, one.surface) for one in figures]
    surface_chart(surfaces, config.extent, title).save(folder / "surface.png")
    if can_write():
        write_surface_page(folder / "surface.html", surfaces, facts["axis"], title)
    else:
        logger.warning("surface.html was left out: it needs the package plotly: pip install plotly")


def _rise(figures: FlatnessFigures, sigmas: Sequence[float]) -> Curve:
    rises = figures.rises["filter"]
    return sigmas, [rise.mean for rise in rises], [rise.error for rise in rises]


def _slice(figures: FlatnessFigures, at: Sequence[float]) -> Curve:
    """Mean and standard error over the directions."""
    columns = list(zip(*figures.slices, strict=True))
    errors = [statistics.stdev(column) / len(column) ** 0.5 for column in columns]
    return at, [statistics.mean(column) for column in columns], errors


def _strength(figures: FlatnessFigures, base: FlatnessFigures, kind: str) -> Curve:
    """The base's loss is the same at any strength."""
    if not figures.strengths:
        return (0.0, 2.0), [base.losses[kind]] * 2, ()
    return list(figures.strengths), [losses[kind] for losses in figures.strengths.values()], ()
