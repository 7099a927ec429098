"""The flatness figures of runs as charts, in the colours of their methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatlora_diffusion.charts.lines import titled_chart
from flatlora_diffusion.charts.palette import BASE, METHODS, THIRD
from flatlora_diffusion.config import FlatnessConfig
from flatlora_diffusion.flatness.figures import HELDOUT, IMAGES, TRAIN, FlatnessFigures
from flatlora_diffusion.flatness.landscape_pictures import Curve, lines_of, write_landscape


def write_charts(
    folder: Path, config: FlatnessConfig, figures: Sequence[FlatnessFigures], facts: Mapping[str, Any]
) -> None:
    """Write strength.png and what `write_landscape` writes.

    `figures` has the base's first; `facts` has each run's method by its name.
    """
    looks = [BASE, *(METHODS.get(facts["runs"][run.name]["method"], THIRD) for run in figures[1:])]
    write_landscape(folder, config, figures, looks)
    kind = HELDOUT if HELDOUT in figures[0].losses else TRAIN
    title = f"Loss by strength of the LoRA, {IMAGES[kind]}"
    strengths = lines_of(figures, looks, [_strength(one, figures[0], kind) for one in figures])
    titled_chart(strengths, title, "strength", "loss").save(folder / "strength.png")


def _strength(figures: FlatnessFigures, base: FlatnessFigures, kind: str) -> Curve:
    """The base's loss is the same at any strength."""
    if not figures.strengths:
        return (0.0, 2.0), [base.losses[kind]] * 2, ()
    return list(figures.strengths), [losses[kind] for losses in figures.strengths.values()], ()
