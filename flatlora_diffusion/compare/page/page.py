"""A comparison as one HTML page: the verdict and the pictures first, then everything else; it works offline.

The page's looks are in the templates and the style sheet of `templates/`; Python prepares what they show.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from flatlora_diffusion.charts.palette import TONES
from flatlora_diffusion.compare.page.curves import groups, strengths, trajectories
from flatlora_diffusion.compare.page.format import Chip, Result, chip
from flatlora_diffusion.compare.page.provenance import advice, alarm, kicker, made_with, nulls, proof, settings
from flatlora_diffusion.compare.page.results import numbers, paired, verdict_chart
from flatlora_diffusion.storage.atomic_io import write_text

PAGE, GRID, RESULT = "compare.html", "compare.png", "compare.json"
_PARTS = Path(__file__).parent / "templates"
_SECTIONS = (numbers, paired, trajectories, strengths, groups, advice, nulls, proof, settings, made_with)
_LARGEST_PNG = 400_000  # bytes; larger ones go in as JPEG, or two dozen pictures of SDXL would make 45 MB
_PROMPTS_AT_ONCE = 8  # as many as stand side by side and are still worth looking at


def write_compare_page(result: Mapping[str, Any], folder: Path) -> Path:
    """Write `compare.html` into `folder`, which holds the pictures that `result` names; returns its path."""
    path = folder / PAGE
    write_text(path, compare_page(result, folder) + "\n")
    return path


def compare_page(result: Mapping[str, Any], folder: Path, is_framed: bool = False) -> str:
    """The page of `result` with its pictures from `folder`.

    is_framed: for the `srcdoc` of a frame without scripts, where a plain `#section` would be one of the page around.
    """
    environment = Environment(
        loader=FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _part("script.js")
    return environment.get_template("page.html").render(
        style=_part("style.css"),
        tones=TONES,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        kicker=kicker(result),
        alarm=alarm(result),
        verdict=result["verdict"],
        headline=verdict_chart(result),
        grids=_grids(result, folder),
        sections=[section for section in (build(result) for build in _SECTIONS) if section.content is not None],
        is_framed=is_framed,
        here="about:srcdoc" if is_framed else "",
    )


def _part(name: str) -> Markup:
    """A file of ours that goes into the page as it is."""
    return Markup((_PARTS / name).read_text(encoding="utf-8"))


def _grids(result: Result, folder: Path) -> list[Mapping[str, Any]]:
    """Grids of pictures, the first one for the first screen: a column per prompt and a row per model."""
    shown = result["pictures"]
    columns, files = shown.get("columns", []), shown.get("files", [])
    if not columns or not any(files):
        return []
    chips = {one.name: one for one in (chip(result, key) for key in ("base", *_keys(result)))}
    models = [chips.get(name, Chip(name, Markup())) for name in columns]
    prompts = [
        {"text": prompt or "", "pictures": _row(folder, columns, row)}
        for prompt, *row in zip_longest(shown["prompts"], *files)
    ]
    starts = range(0, len(prompts), _PROMPTS_AT_ONCE)
    return [{"models": models, "prompts": prompts[at : at + _PROMPTS_AT_ONCE]} for at in starts]


def _keys(result: Result) -> list[str]:
    return [arm["key"] for arm in result["arms"]]


def _row(folder: Path, models: Sequence[str], files: Sequence[str | None]) -> list[Mapping[str, str]]:
    return [{"model": model, "source": _embedded(folder, file)} for model, file in zip(models, files, strict=True)]


def _embedded(folder: Path, file: str | None) -> str:
    """The picture as a data URI; empty when it is not there, or not inside of `folder`."""
    path = (folder / (file or "")).resolve()
    if not path.is_file() or not path.is_relative_to(folder.resolve()):
        return ""
    if path.stat().st_size <= _LARGEST_PNG:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
