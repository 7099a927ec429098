"""Charts of the flatness of runs, in the colours of their methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from flatlora_diffusion.charts.lines import Chart, titled_chart
from flatlora_diffusion.charts.palette import BASE, OWN_LOOKS, THIRD, Look
from flatlora_diffusion.config import FlatnessConfig, LandscapeConfig
from flatlora_diffusion.flatness.functional import Estimate
from flatlora_diffusion.flatness.measure import HELDOUT, IMAGES, TRAIN, FlatnessFigures
from flatlora_diffusion.flatness.plots import Curve, landscape_charts, lines_of, write_landscape

_STRENGTH = "strength.png"


def write_charts(
    folder: Path, config: FlatnessConfig, figures: Sequence[FlatnessFigures], facts: Mapping[str, Any]
) -> None:
    """Write strength.png and the files of `write_landscape`.

    `figures` starts with the base; `facts` has the settings of each run by its name.
    """
    write_landscape(folder, config, figures, _looks(figures, facts))
    _strengths(figures, facts).save(folder / _STRENGTH)


def charts_of(result: Mapping[str, Any]) -> dict[str, Chart]:
    """Return the charts of a flatness.json by file name.

    Raises LookupError, TypeError, ValueError or AttributeError for a file of another version.
    """
    figures = [_figures(saved) for saved in result["figures"]]
    names = {item.name for item in fields(LandscapeConfig)}
    settings = {name: value for name, value in result["settings"].items() if name in names}
    config = LandscapeConfig(**settings | {"sigmas": tuple(settings["sigmas"])})
    charts = landscape_charts(config, figures, _looks(figures, result))
    return charts | {_STRENGTH: _strengths(figures, result)}


def _figures(saved: Mapping[str, Any]) -> FlatnessFigures:
    """Restore saved figures, without the curvature, which is in no chart."""
    rises = {
        kind: [Estimate(tuple(estimate["values"])) for estimate in estimates]
        for kind, estimates in saved["rises"].items()
    }
    strengths = {float(strength): losses for strength, losses in saved["strengths"].items()}
    return FlatnessFigures(**{**saved, "rises": rises, "strengths": strengths, "curvature": {}})


def _looks(figures: Sequence[FlatnessFigures], facts: Mapping[str, Any]) -> list[Look]:
    return [BASE, *(OWN_LOOKS.get(facts["runs"][run.name]["method"], THIRD) for run in figures[1:])]


def _strengths(figures: Sequence[FlatnessFigures], facts: Mapping[str, Any]) -> Chart:
    kind = HELDOUT if HELDOUT in figures[0].losses else TRAIN
    title = f"Loss by strength of the LoRA, {IMAGES[kind]}"
    lines = lines_of(figures, _looks(figures, facts), [_strength(model, figures[0], kind) for model in figures])
    return titled_chart(lines, title, "strength", "loss")


def _strength(figures: FlatnessFigures, base: FlatnessFigures, kind: str) -> Curve:
    """Return the loss by strength; the base's is constant."""
    if not figures.strengths:
        return (0.0, 2.0), [base.losses[kind]] * 2, ()
    return list(figures.strengths), [losses[kind] for losses in figures.strengths.values()], ()
