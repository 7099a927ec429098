"""The flatness figures as Markdown: figures in rows, base and runs in columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flatlora_diffusion.config import FlatnessConfig
from flatlora_diffusion.flatness.figures import Figures
from flatlora_diffusion.flatness.robustness import STRENGTHS
from flatlora_diffusion.flatness.weight_space import Estimate

_IMAGES = {"train": "training images", "heldout": "held-out images"}
_NOISES = {"filter": "Eq. 7", "iid": "iid"}
_METRICS = {"filter": "filter-normalized", "raw": "raw"}

Cell = Callable[[Figures], str]


def tables(figures: Sequence[Figures], config: FlatnessConfig) -> str:
    """The flatness of all arms, and what strength, bits and rank do to the loss of the runs.

    Errors are standard errors over draws of the noise, not over trainings.
    """
    base, runs = figures[0], figures[1:]
    parts = [
        _table("flatness at W'", figures, [*_flatness_rows(config, base), *_paired_rows(config, runs)]),
        f"± is the standard error over {config.rise_draws} draws of the noise, which all share; it says nothing about "
        "how other trainings would differ. Smaller is flatter.",
        _table("loss after a change", runs, _robustness_rows(base, runs)),
    ]
    return "\n\n".join(parts)


def _flatness_rows(config: FlatnessConfig, base: Figures) -> list[tuple[str, Cell]]:
    rows: list[tuple[str, Cell]] = [
        (f"loss, {_IMAGES[kind]}", lambda found, kind=kind: f"{found.losses[kind]:.5f}")  # type: ignore[misc]
        for kind in base.losses
    ]
    for kind, label in _NOISES.items():
        for place, sigma in enumerate(config.sigmas):
            rows.append(
                (
                    f"expected rise, {label}, sigma {sigma:g}",
                    lambda found, kind=kind, place=place: _estimate(found.rises[kind][place]),  # type: ignore[misc]
                )
            )
    for place, radius in enumerate(config.radii):
        rows.append(
            (f"worst-case rise, radius {radius:g}", lambda found, place=place: f"{found.worst[place]:.3e}")  # type: ignore[misc]
        )
    for metric in base.curvature:
        rows += _curvature_rows(metric, len(base.curvature[metric].eigenvalues))
    return rows


def _curvature_rows(metric: str, count: int) -> list[tuple[str, Cell]]:
    def eigenvalue(place: int) -> Cell:
        def cell(found: Figures) -> str:
            value = found.curvature[metric].eigenvalues[place]
            return f"{value.value:.3e} ± {value.residual:.0e}"

        return cell

    rows = [(f"Hessian eigenvalue {place + 1}, {_METRICS[metric]}", eigenvalue(place)) for place in range(count)]
    return [*rows, (f"Hessian trace, {_METRICS[metric]}", lambda found: _estimate(found.curvature[metric].trace))]


def _paired_rows(config: FlatnessConfig, runs: Sequence[Figures]) -> list[tuple[str, Cell]]:
    """The differences of the runs to the first, draw by draw."""
    if len(runs) < 2:
        return []
    first = runs[0]

    def difference(place: int) -> Cell:
        def cell(found: Figures) -> str:
            if found not in runs[1:]:
                return ""
            return _estimate(found.rises["filter"][place].minus(first.rises["filter"][place]))

        return cell

    return [
        (f"rise less that of {first.name}, Eq. 7, sigma {sigma:g}", difference(place))
        for place, sigma in enumerate(config.sigmas)
    ]


def _robustness_rows(base: Figures, runs: Sequence[Figures]) -> list[tuple[str, Cell]]:
    rows: list[tuple[str, Cell]] = []
    changes = list(dict.fromkeys(name for found in runs for name in found.variants))
    for kind in base.losses:
        for strength in STRENGTHS:
            rows.append(
                (
                    f"strength {strength:g}, {_IMAGES[kind]}",
                    lambda found, kind=kind, s=strength: f"{found.strengths[s][kind]:.5f}",  # type: ignore[misc]
                )
            )
        for name in changes:
            rows.append((f"{name}, {_IMAGES[kind]}", _variant(name, kind)))
    return rows


def _variant(name: str, kind: str) -> Cell:
    return lambda found: f"{found.variants[name][kind]:.5f}" if name in found.variants else ""


def _table(corner: str, columns: Sequence[Figures], rows: Sequence[tuple[str, Cell]]) -> str:
    """Markdown whose cells are padded, so that it is a table on a terminal too."""
    lines = [[corner, *(found.name for found in columns)]]
    lines += [[label, *(cell(found) for found in columns)] for label, cell in rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| "
        + " | ".join(_padded(cell, width, place) for place, (cell, width) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    )


def _padded(cell: str, width: int, place: int) -> str:
    return cell.ljust(width) if place == 0 else cell.rjust(width)


def _estimate(found: Estimate) -> str:
    return f"{found.mean:.3e} ± {found.error:.0e}"
