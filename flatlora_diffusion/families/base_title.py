"""The name of a base in logs, summaries and pages; needs neither torch nor weights."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.config import INCLUDED_BASES, TINY, TINY_KLEIN, ModelConfig

TINY_TITLE, TINY_KLEIN_TITLE = "the tiny demo base", "the tiny klein base"
_TITLES = {TINY: TINY_TITLE, TINY_KLEIN: TINY_KLEIN_TITLE}
_REMEDIES = {TINY: "SDXL", TINY_KLEIN: "FLUX.2 klein"}


def included_title(model: ModelConfig) -> str | None:
    """Return the name of an included base, given by name or by folder; None for another base."""
    name = _included_name(model)
    return None if name is None else _TITLES[name]


def remedy(model: ModelConfig) -> str | None:
    """Return how to train for a real base instead of an included base; None for another base."""
    name = _included_name(model)
    return None if name is None else f"give --pretrained_model_name_or_path for {_REMEDIES[name]}"


def title_with_size(name: str, pixels: int) -> str:
    """Return a base's name with its native image size."""
    return f"{name}, {pixels} pixels"


def _included_name(model: ModelConfig) -> str | None:
    given = model.pretrained_model_name_or_path
    folder = INCLUDED_BASES.get(given, Path(given)).resolve()
    return next((name for name, place in INCLUDED_BASES.items() if place.resolve() == folder), None)
