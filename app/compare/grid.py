"""The comparison as a part of the page: a labelled grid to zoom row by row."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from ..widgets.html import file_url, read_static
from ..widgets.run_cards import base_name
from ..widgets.theme import COLOURS, NO_METHOD
from .comparison import Comparison, GridRow
from .picture_cache import Picture

AMPLIFIED = 4  # differences, so that faint ones are seen
WHILE_LOADING = '<div class="fl-empty">Looking for finished runs ...</div>'

GRID_CSS = read_static("empty.css", "grid.css", AMPLIFIED=str(AMPLIFIED))

GRID_SCRIPT = read_static("grid.js")


def grid_page(comparison: Comparison, drawn: Mapping[Picture, Path], reference: int | None) -> str:
    """HTML of all rows, with gaps for missing pictures.

    Columns after `reference` show their amplified difference to that column.
    """
    columns = len(comparison.titles)
    heads = "".join(
        f'<div style="border-color:{COLOURS.get(title, NO_METHOD)}"><b>{escape(title)}</b>'
        f"<span>{escape(name)}</span></div>"
        for title, name in difference_titles(comparison, reference)
    )
    lines = "".join(_line(comparison, row, drawn, reference) for row in comparison.rows())
    widest = max(64, min(360, 5 * comparison.drawing.resolution))
    style = f"--columns: {columns}; --widest: {widest}px"
    message = f'<p class="fl-label">{message}</p>' if (message := enlarged(comparison)) else ""
    return f'<div class="fl-grid" style="{style}">{message}<div class="fl-line fl-heads">{heads}</div>{lines}</div>'


def enlarged(comparison: Comparison) -> str:
    """A note that small pictures are enlarged, with the base's name; empty for large pictures."""
    size = comparison.drawing.resolution
    base = base_name(comparison.drawing.base[1])
    return "" if size >= 256 else f"Drawn by {base} at {size} x {size} pixels; enlarged, they look soft."


def difference_titles(comparison: Comparison, reference: int | None) -> list[tuple[str, str]]:
    """(method, run name) of each column."""
    if reference is None:
        return comparison.titles
    compared = comparison.titles[reference][0]
    return [
        (title, name if place <= reference else f"{name}: difference to {compared}")
        for place, (title, name) in enumerate(comparison.titles)
    ]


def _line(comparison: Comparison, row: GridRow, drawn: Mapping[Picture, Path], reference: int | None) -> str:
    compared = None if reference is None else drawn.get(row.pictures[reference])
    cells = []
    for place, (picture, (title, name)) in enumerate(zip(row.pictures, comparison.titles, strict=True)):
        path = drawn.get(picture)
        if path is None:
            cells.append('<div class="fl-cell fl-open">not drawn yet</div>')
            continue
        alt = escape(f"{title}, {name}: {row.label}")
        images = f'<img src="{file_url(path)}" alt="{alt}" draggable="false">'
        kind = "fl-cell"
        if compared is not None and reference is not None and place > reference:
            kind = "fl-cell fl-diff"
            images += f'<img src="{file_url(compared)}" alt="" draggable="false">'
        hint = "Click to zoom the whole row"
        cells.append(
            f'<div class="{kind}" tabindex="0" role="button" title="{hint}" aria-label="{alt}">{images}</div>'
        )
    return f'<div><p class="fl-label">{escape(row.label)}</p></div><div class="fl-line">{"".join(cells)}</div>'
