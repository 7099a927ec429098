"""Values with their intervals, one below the other in groups: what studies call a forest plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from flatlora_diffusion.charts.lines import Chart, styled
from flatlora_diffusion.charts.palette import FAINT, INK, Look

_ROW, _HEAD = 0.28, 1.1  # inches
_TEXT = 11


@dataclass(frozen=True)
class Row:
    """A value by name, with the ends of its interval if it has one."""

    name: str
    value: float
    look: Look
    low: float | None = None
    high: float | None = None


def forest_chart(groups: Sequence[tuple[str, Sequence[Row]]], title: str, x_label: str) -> Chart:
    """The rows of each named group below its name, and a line at 0."""
    places = sum(len(rows) + 1 for _, rows in groups)
    names: list[tuple[float, str, bool]] = []
    with styled(_TEXT):
        figure = Figure(figsize=(7.2, _HEAD + _ROW * places))
        axes = figure.add_subplot()
        axes.axvline(0, color=INK.light, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        place = 0.0
        for group, rows in groups:
            names.append((place, group, True))
            for row in rows:
                place -= 1
                names.append((place, row.name, False))
                colour = row.look.tone.light
                if row.low is not None and row.high is not None:
                    axes.plot(
                        (row.low, row.high),
                        (place, place),
                        "|-",
                        color=colour,
                        mec=colour,
                        lw=2,
                        mew=2,
                        ms=7,
                        zorder=2,
                    )
                axes.plot(row.value, place, row.look.marker, color=colour, ms=7, zorder=3)
            place -= 1
        axes.set_yticks([at for at, _, _ in names], [text for _, text, _ in names])
        for label, (_, _, is_head) in zip(axes.get_yticklabels(), names, strict=True):
            label.set(color=INK.light if is_head else FAINT.light, fontweight="bold" if is_head else "normal")
        axes.set_ylim(place + 0.5, 0.7)
        axes.tick_params("y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label, labelpad=8)
        figure.suptitle(title, x=0.02, ha="left", fontsize=13)
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    return Chart(figure)
