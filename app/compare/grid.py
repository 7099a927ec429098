"""The comparison as a part of the page: a labelled grid to zoom row by row."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from ..runs.base_names import base_name
from ..widgets.html import file_url
from ..widgets.theme import COLOURS, NO_METHOD
from .comparison import Comparison, GridRow
from .picture_cache import Picture

AMPLIFIED = 4  # differences, so that faint ones are seen
WHILE_LOADING = '<div class="fl-empty">Looking for finished runs ...</div>'

GRID_CSS = """
.fl-grid { display: grid; gap: 10px; }
.fl-line { display: grid; gap: 8px;
  grid-template-columns: repeat(var(--columns), minmax(0, var(--fl-size, var(--widest)))); }
.fl-heads { position: sticky; top: 0; z-index: 2; padding: 6px 0; background: var(--body-background-fill); }
.fl-heads > div { border-top: 4px solid; padding-top: 4px; }
.fl-heads b { display: block; }
.fl-heads span { color: var(--body-text-color-subdued); font-size: 12px; overflow-wrap: anywhere; }
.fl-label { margin: 6px 0 -4px; font-size: 14px; color: var(--body-text-color); overflow-wrap: anywhere; }
.fl-cell { position: relative; isolation: isolate; overflow: hidden; margin: 0; aspect-ratio: 1; border-radius: 8px;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); cursor: zoom-in; }
.fl-cell:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 1px; }
.fl-cell img { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; object-fit: contain;
  transform-origin: var(--x, 50%) var(--y, 50%); transition: transform .15s; }
.fl-zoomed .fl-cell { cursor: zoom-out; }
.fl-zoomed .fl-cell img { transform: scale(3); }
.fl-cell.fl-diff { filter: brightness(AMPLIFIED); border-color: transparent; }
.fl-cell.fl-diff img + img { mix-blend-mode: difference; }
.fl-cell.fl-open { cursor: default; border-style: dashed; display: grid; place-items: center; padding: 4px;
  color: var(--body-text-color-subdued); font-size: 12px; text-align: center; }
.fl-empty { padding: 48px 20px; text-align: center; border: 1px dashed var(--border-color-primary);
  border-radius: 12px; color: var(--body-text-color-subdued); }
.fl-empty b { display: block; margin-bottom: 6px; font-size: 17px; color: var(--body-text-color); }
""".replace("AMPLIFIED", str(AMPLIFIED))

# One listener for all rows, as the rows come and go. The pointer's place in one picture is that in all of its row.
GRID_SCRIPT = """
const cellOf = (event) => event.target.closest('.fl-cell:not(.fl-open)');
const aim = (cell, event) => {
  const box = cell.getBoundingClientRect(), line = cell.parentElement;
  line.style.setProperty('--x', Math.round(100 * (event.clientX - box.left) / box.width) + '%');
  line.style.setProperty('--y', Math.round(100 * (event.clientY - box.top) / box.height) + '%');
};
element.addEventListener('click', (event) => {
  const cell = cellOf(event);
  if (!cell) return;
  aim(cell, event);
  cell.parentElement.classList.toggle('fl-zoomed');
});
element.addEventListener('pointermove', (event) => {
  const cell = cellOf(event);
  if (cell && cell.parentElement.classList.contains('fl-zoomed')) aim(cell, event);
});
element.addEventListener('keydown', (event) => {
  const cell = cellOf(event);
  if (!cell || (event.key !== 'Enter' && event.key !== ' ' && event.key !== 'Escape')) return;
  event.preventDefault();
  const line = cell.parentElement;
  line.style.setProperty('--x', '50%');
  line.style.setProperty('--y', '50%');
  line.classList.toggle('fl-zoomed', event.key === 'Escape' ? false : undefined);
});
"""


def grid_page(comparison: Comparison, drawn: Mapping[Picture, Path], reference: int | None) -> str:
    """HTML of all rows; what is not drawn is left open. Columns after that of `reference` show how they
    differ from it, amplified.
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
    told = f'<p class="fl-label">{told}</p>' if (told := enlarged(comparison)) else ""
    return f'<div class="fl-grid" style="{style}">{told}<div class="fl-line fl-heads">{heads}</div>{lines}</div>'


def enlarged(comparison: Comparison) -> str:
    """That small pictures are shown larger than they are, and by which base; empty for those that are not small."""
    size = comparison.drawing.resolution
    base = base_name(comparison.drawing.base[1])
    return "" if size >= 256 else f"Drawn by {base} at {size} x {size} pixels; enlarged, they look soft."


def difference_titles(comparison: Comparison, reference: int | None) -> list[tuple[str, str]]:
    """(what it is, the run's name) of each column."""
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
