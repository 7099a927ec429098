"""The comparison as files: one PNG, and one self-contained HTML page."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageChops

from flatlora_diffusion.gallery.grid import labelled_grid
from flatlora_diffusion.storage.atomic_io import atomic_write, write_text

from ..process.file_cache import file_hash
from ..widgets.html import data_url, read_static
from ..widgets.run_cards import base_name
from .comparison import Comparison, GridRow
from .grid import AMPLIFIED, difference_titles, enlarged
from .picture_cache import PRECISIONS, Picture

_CELL = 320
_SMALL = 256  # pixels; larger pictures go into the page as WebP, else it would be too large to send
_STYLE = read_static("export.css")


def save_grid(comparison: Comparison, drawn: Mapping[Picture, Path], reference: int | None, folder: Path) -> Path:
    """Write the grid as a PNG into `folder`, once for the same pictures and labels. All must be drawn."""
    path = folder / f"comparison-{_key(comparison, reference)}.png"
    if path.is_file():
        return path
    rows = comparison.rows()
    images = [_images(row, drawn, reference) for row in rows]
    titles = difference_titles(comparison, reference)
    labels = [title if title == "Base" else f"{title}\n{name}" for title, name in titles]
    folder.mkdir(parents=True, exist_ok=True)
    grid = labelled_grid(images, [row.label for row in rows], labels, _CELL, _caption(comparison, reference))
    with atomic_write(path) as aside:
        grid.save(aside, "PNG")
    return path


def save_page(comparison: Comparison, drawn: Mapping[Picture, Path], reference: int | None, folder: Path) -> Path:
    """Write the grid as one HTML file without scripts or other files into `folder`. All must be drawn."""
    path = folder / f"comparison-{_key(comparison, reference)}.html"
    if path.is_file():
        return path
    titles = difference_titles(comparison, reference)
    compared = " and ".join(dict.fromkeys(title for title, _ in comparison.titles[1:]))
    columns = '<colgroup><col class="label">' + "<col>" * len(titles) + "</colgroup>"
    heads = "".join(f"<th>{escape(title)}<small>{escape(name)}</small></th>" for title, name in titles)
    rows = "".join(_row(row, titles, drawn, reference) for row in comparison.rows())
    facts = "".join(f"<p>{escape(fact)}</p>" for fact in [_caption(comparison, reference), *_facts(comparison)])
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\"><title>Comparison</title>"
        f"<style>{_STYLE}</style></head><body><h1>{escape(compared)}, beside the base</h1>{facts}"
        f"<table>{columns}<thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></body></html>\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def difference(image: Image.Image, other: Image.Image) -> Image.Image:
    """|image - other| of two RGB images of one size, amplified."""
    return ImageChops.difference(image, other).point([min(255, value * AMPLIFIED) for value in range(256)] * 3)


def _key(comparison: Comparison, reference: int | None) -> str:
    rows = [(row.label, [one.key for one in row.pictures]) for row in comparison.rows()]
    return hashlib.sha256(repr([comparison.titles, rows, reference, _STYLE]).encode()).hexdigest()[:12]


def _caption(comparison: Comparison, reference: int | None) -> str:
    caption = f"{comparison.steps} steps, guidance {comparison.guidance:g}"
    if len(comparison.strengths) == 1:
        caption += f", strength {comparison.strengths[0]:g}"
    return caption + (f"; differences x {AMPLIFIED}" if reference is not None else "")


def _facts(comparison: Comparison) -> list[str]:
    drawing = comparison.drawing
    precision = PRECISIONS[drawing.precision]
    name = base_name(drawing.base[1])
    loras = [f"{arm.title} {arm.name}: LoRA file SHA-256 {file_hash(arm.file)[:16]}" for arm in comparison.arms]
    small = [message] if (message := enlarged(comparison)) else []
    return [f"Base: {name}, {drawing.resolution} pixels, {precision}, base's hash {drawing.identity}", *loras, *small]


def _row(row: GridRow, titles: Sequence[tuple[str, str]], drawn: Mapping[Picture, Path], reference: int | None) -> str:
    cells = ""
    for image, (title, name) in zip(_images(row, drawn, reference), titles, strict=True):
        url = data_url(image, "PNG" if max(image.size) <= _SMALL else "WEBP", quality=90)
        cells += f'<td><img src="{url}" alt="{escape(f"{title}, {name}: {row.label}")}"></td>'
    return f"<tr><th>{escape(row.label)}</th>{cells}</tr>"


def _images(row: GridRow, drawn: Mapping[Picture, Path], reference: int | None) -> list[Image.Image]:
    images = [_opened(drawn[picture]) for picture in row.pictures]
    if reference is None:
        return images
    compared = images[reference]
    return [*images[: reference + 1], *(difference(image, compared) for image in images[reference + 1 :])]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
