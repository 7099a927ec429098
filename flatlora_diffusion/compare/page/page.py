"""Renders a comparison as one HTML page that works offline: the verdict and the pictures first, then the sections.

The layout is in the templates and the style sheet of `templates/`; Python prepares their contents.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flatlora_diffusion.charts.palette import TONES
from flatlora_diffusion.compare.page.by_image import images
from flatlora_diffusion.compare.page.curves import groups, strengths, trajectories
from flatlora_diffusion.compare.page.format import Chip, Result, Section, chip, data_uri
from flatlora_diffusion.compare.page.provenance import advice, controls, proof, settings, subtitle, versions, warning
from flatlora_diffusion.compare.page.results import numbers, paired, verdict_chart
from flatlora_diffusion.storage.atomic_io import write_text

PAGE, GRID, RESULT = "compare.html", "compare.png", "compare.json"
_TEMPLATES = Path(__file__).parent / "templates"
_PROMPTS_PER_GRID = 8


def write_compare_page(result: Mapping[str, Any], folder: Path) -> Path:
    """Write `compare.html` into `folder`, which contains the pictures of `result`; return its path."""
    path = folder / PAGE
    write_text(path, compare_page(result, folder) + "\n")
    return path


def compare_page(result: Mapping[str, Any], folder: Path, is_framed: bool = False) -> str:
    """Render the page of `result` with its pictures from `folder`.

    Args:
        is_framed: Render for the `srcdoc` of a frame without scripts, where a plain `#section` link would refer to
            the surrounding page.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _raw_file("script.js")
    return environment.get_template("page.html").render(
        style=_raw_file("style.css"),
        tones=TONES,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        subtitle=subtitle(result),
        warning=warning(result),
        verdict=result["verdict"],
        headline=verdict_chart(result),
        grids=_grids(result, folder),
        sections=_sections(result, folder),
        is_framed=is_framed,
        here="about:srcdoc" if is_framed else "",
    )


def _sections(result: Result, folder: Path) -> list[Section]:
    built = (
        *(build(result) for build in (numbers, paired, trajectories, strengths, groups)),
        images(result, folder),
        *(build(result) for build in (advice, controls, proof, settings, versions)),
    )
    return [section for section in built if section.content is not None]


def _raw_file(name: str) -> Markup:
    """A template file that is inserted without escaping."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


def _grids(result: Result, folder: Path) -> list[Mapping[str, Any]]:
    """Grids of pictures with a column per prompt and a row per model."""
    pictures = result["pictures"]
    columns, files = pictures.get("columns", []), pictures.get("files", [])
    if not columns or not any(files):
        return []
    arm_keys = [arm["key"] for arm in result["arms"]]
    chips = {label.name: label for label in (chip(result, key) for key in ("base", *arm_keys))}
    models = [chips.get(name, Chip(name, Markup())) for name in columns]
    prompts = [
        {"text": prompt or "", "pictures": _row(folder, columns, row)}
        for prompt, *row in zip_longest(pictures["prompts"], *files)
    ]
    starts = range(0, len(prompts), _PROMPTS_PER_GRID)
    return [{"models": models, "prompts": prompts[start : start + _PROMPTS_PER_GRID]} for start in starts]


def _row(folder: Path, models: Sequence[str], files: Sequence[str | None]) -> list[Mapping[str, str]]:
    return [{"model": model, "source": data_uri(folder, file)} for model, file in zip(models, files, strict=True)]
