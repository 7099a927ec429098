"""The flatness figures as Markdown: figures in rows, base and runs in columns."""

from __future__ import annotations

from collections.abc import Sequence

from flatlora_diffusion.config import FlatnessConfig
from flatlora_diffusion.flatness.functional import Estimate
from flatlora_diffusion.flatness.measure import IMAGES, FlatnessFigures
from flatlora_diffusion.flatness.perturbed_models import STRENGTHS

_NOISES = {"filter": "Eq. 7", "iid": "iid"}
_METRICS = {"filter": "filter-normalized", "raw": "raw"}

Line = tuple[str, list[str]]
"""A figure's name and a cell for each column."""


def markdown_tables(figures: Sequence[FlatnessFigures], config: FlatnessConfig) -> str:
    """The flatness of the base and the runs, and the runs' loss at other strengths, bits and ranks.

    `figures` has the base's first. Errors are standard errors over draws of the noise, not over trainings.
    """
    base, *runs = figures
    parts = [
        _table("flatness at W'", figures, [*_flatness_lines(config, figures), *_paired_lines(config, runs)]),
        f"± is the standard error over {config.rise_draws} draws of the noise, which all share; it says nothing about "
        "how other trainings would differ. Smaller is flatter.",
        _table("loss after a change", runs, _robustness_lines(list(base.losses), runs)),
    ]
    return "\n\n".join(parts)


def _flatness_lines(config: FlatnessConfig, figures: Sequence[FlatnessFigures]) -> list[Line]:
    lines = [(f"loss, {IMAGES[kind]}", [f"{one.losses[kind]:.5f}" for one in figures]) for kind in figures[0].losses]
    for kind, label in _NOISES.items():
        for place, sigma in enumerate(config.sigmas):
            rises = [_estimate(one.rises[kind][place]) for one in figures]
            lines.append((f"expected rise, {label}, sigma {sigma:g}", rises))
    for place, radius in enumerate(config.radii):
        lines.append((f"worst-case rise, radius {radius:g}", [f"{one.worst[place]:.3e}" for one in figures]))
    for place, radius in enumerate(config.radii):
        rises = [f"{one.worst_factors[place]:.3e}" if one.worst_factors else "" for one in figures]
        lines.append((f"worst-case rise in A and B, radius {radius:g}", rises))
    for metric in figures[0].curvature:
        lines += _curvature_lines(metric, figures)
    return lines


def _curvature_lines(metric: str, figures: Sequence[FlatnessFigures]) -> list[Line]:
    curvatures = [one.curvature[metric] for one in figures]
    lines = []
    for place in range(len(curvatures[0].eigenvalues)):
        eigenvalues = [curvature.eigenvalues[place] for curvature in curvatures]
        cells = [f"{one.value:.3e} ± {one.residual:.0e}" for one in eigenvalues]
        lines.append((f"Hessian eigenvalue {place + 1}, {_METRICS[metric]}", cells))
    return [*lines, (f"Hessian trace, {_METRICS[metric]}", [_estimate(curvature.trace) for curvature in curvatures])]


def _paired_lines(config: FlatnessConfig, runs: Sequence[FlatnessFigures]) -> list[Line]:
    """The differences of the runs to the first, draw by draw; nothing below the base and the first."""
    if len(runs) < 2:
        return []
    first, *others = runs
    lines = []
    for place, sigma in enumerate(config.sigmas):
        reference = first.rises["filter"][place]
        differences = [_estimate(one.rises["filter"][place].minus(reference)) for one in others]
        lines.append((f"rise less that of {first.name}, Eq. 7, sigma {sigma:g}", ["", "", *differences]))
    return lines


def _robustness_lines(kinds: Sequence[str], runs: Sequence[FlatnessFigures]) -> list[Line]:
    names = list(dict.fromkeys(name for run in runs for name in run.variants))
    lines = []
    for kind in kinds:
        for strength in STRENGTHS:
            losses = [f"{run.strengths[strength][kind]:.5f}" for run in runs]
            lines.append((f"strength {strength:g}, {IMAGES[kind]}", losses))
        for name in names:
            losses = [f"{run.variants[name][kind]:.5f}" if name in run.variants else "" for run in runs]
            lines.append((f"{name}, {IMAGES[kind]}", losses))
    return lines


def _table(corner: str, columns: Sequence[FlatnessFigures], lines: Sequence[Line]) -> str:
    """Markdown whose cells are padded, so that it is a table on a terminal too."""
    rows = [[corner, *(column.name for column in columns)], *([label, *cells] for label, cells in lines)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(_padded(row, widths) for row in rows)


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    """The first cell to the left, the others to the right."""
    others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "| " + " | ".join([row[0].ljust(widths[0]), *others]) + " |"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.mean:.3e} ± {estimate.error:.0e}"
