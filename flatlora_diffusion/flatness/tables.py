"""Flatness measurements as Markdown tables: measurements in rows, base and runs in columns."""

from __future__ import annotations

from collections.abc import Sequence

from flatlora_diffusion.config import FlatnessConfig
from flatlora_diffusion.flatness.functional import Estimate
from flatlora_diffusion.flatness.measure import IMAGES, FlatnessFigures
from flatlora_diffusion.flatness.perturbed_models import STRENGTHS

_NOISES = {"filter": "Eq. 7", "iid": "iid"}
_METRICS = {"filter": "filter-normalized", "raw": "raw"}

Line = tuple[str, list[str]]
"""A measurement's name and a cell for each column."""


def markdown_tables(figures: Sequence[FlatnessFigures], config: FlatnessConfig) -> str:
    """Return tables of the flatness of the base and the runs, and of the runs' losses after changes.

    `figures` starts with the base. Errors are standard errors over draws of the noise, not over trainings.
    """
    base, *runs = figures
    parts = [
        _table("flatness at W'", figures, [*_flatness_lines(config, figures), *_paired_lines(config, runs)]),
        f"± is the standard error over {config.rise_draws} common draws of the noise, not over trainings. Smaller is "
        "flatter.",
        _table("loss after a change", runs, _robustness_lines(list(base.losses), runs)),
    ]
    return "\n\n".join(parts)


def _flatness_lines(config: FlatnessConfig, figures: Sequence[FlatnessFigures]) -> list[Line]:
    lines = [
        (f"loss, {IMAGES[kind]}", [f"{model.losses[kind]:.5f}" for model in figures]) for kind in figures[0].losses
    ]
    for kind, label in _NOISES.items():
        for index, sigma in enumerate(config.sigmas):
            rises = [_estimate(model.rises[kind][index]) for model in figures]
            lines.append((f"expected loss increase, {label}, sigma {sigma:g}", rises))
    for index, radius in enumerate(config.radii):
        rises = [f"{model.worst[index]:.3e}" for model in figures]
        lines.append((f"worst-case loss increase, radius {radius:g}", rises))
    for index, radius in enumerate(config.radii):
        rises = [f"{model.worst_factors[index]:.3e}" if model.worst_factors else "" for model in figures]
        lines.append((f"worst-case loss increase in A and B, radius {radius:g}", rises))
    for metric in figures[0].curvature:
        lines += _curvature_lines(metric, figures)
    return lines


def _curvature_lines(metric: str, figures: Sequence[FlatnessFigures]) -> list[Line]:
    curvatures = [model.curvature[metric] for model in figures]
    lines = []
    for index in range(len(curvatures[0].eigenvalues)):
        eigenvalues = [curvature.eigenvalues[index] for curvature in curvatures]
        cells = [f"{eigenvalue.value:.3e} ± {eigenvalue.residual:.0e}" for eigenvalue in eigenvalues]
        lines.append((f"Hessian eigenvalue {index + 1}, {_METRICS[metric]}", cells))
    return [*lines, (f"Hessian trace, {_METRICS[metric]}", [_estimate(curvature.trace) for curvature in curvatures])]


def _paired_lines(config: FlatnessConfig, runs: Sequence[FlatnessFigures]) -> list[Line]:
    """Return the differences of the runs to the first run, draw by draw."""
    if len(runs) < 2:
        return []
    first, *others = runs
    lines = []
    for index, sigma in enumerate(config.sigmas):
        reference = first.rises["filter"][index]
        differences = [_estimate(run.rises["filter"][index].minus(reference)) for run in others]
        lines.append((f"difference to {first.name}, Eq. 7, sigma {sigma:g}", ["", "", *differences]))
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
    """Return a Markdown table with padded cells, which is readable on a terminal."""
    rows = [[corner, *(column.name for column in columns)], *([label, *cells] for label, cells in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(_padded(row, widths) for row in rows)


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    """Align the first cell to the left, the others to the right."""
    others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "| " + " | ".join([row[0].ljust(widths[0]), *others]) + " |"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.mean:.3e} ± {estimate.error:.0e}"
