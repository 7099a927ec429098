"""The comparison as a page: a labelled grid to zoom row by row; and as one PNG."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageChops

from app.comparison import Comparison, GridRow
from app.picture_cache import Picture
from flatlora_diffusion.grid import labelled_grid

AMPLIFIED = 4  # differences to the base, so that faint ones are seen
WHILE_LOADING = '<div class="fl-empty">Looking for finished runs ...</div>'
_EXPORT_CELL = 320

GRID_CSS = """
.fl-grid { display: grid; gap: 10px; }
.fl-line { display: grid; gap: 8px; grid-template-columns: repeat(var(--columns), minmax(0, var(--widest))); }
.fl-heads { position: sticky; top: 0; z-index: 2; padding: 6px 0; background: var(--background-fill-primary); }
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


def grid_page(comparison: Comparison, found: Mapping[Picture, Path], is_difference: bool) -> str:
    """HTML of all rows; what is not drawn is left open. With `is_difference` the arms show |arm - base|, amplified."""
    columns = len(comparison.titles)
    heads = "".join(
        f"<div><b>{escape(title)}</b><span>{escape(name)}</span></div>" for title, name in comparison.titles
    )
    lines = "".join(_line(comparison, row, found, is_difference) for row in comparison.rows())
    widest = max(64, min(360, 5 * comparison.drawing.resolution))
    style = f"--columns: {columns}; --widest: {widest}px"
    return f'<div class="fl-grid" style="{style}"><div class="fl-line fl-heads">{heads}</div>{lines}</div>'


def empty_page(title: str, text: str) -> str:
    """What stands in place of the grid, and what to do."""
    return f'<div class="fl-empty"><b>{escape(title)}</b>{escape(text)}</div>'


def file_url(path: Path) -> str:
    """Where the page gets a file of the runs folder; relative, so that it holds behind a proxy."""
    return f"gradio_api/file={quote(path.resolve().as_posix())}"


def save_grid(comparison: Comparison, found: Mapping[Picture, Path], is_difference: bool, folder: Path) -> Path:
    """The grid as one PNG in `folder`; that of the same pictures and labels is made once. All must be drawn."""
    rows = comparison.rows()
    shown = [comparison.titles, [(row.label, [one.key for one in row.pictures]) for row in rows], is_difference]
    path = folder / f"comparison-{hashlib.sha256(repr(shown).encode()).hexdigest()[:12]}.png"
    if path.is_file():
        return path
    images = [_images(row, found, is_difference) for row in rows]
    drawing = comparison.drawing
    caption = f"{drawing.steps} steps, guidance {drawing.guidance:g}"
    if len(comparison.strengths) == 1:
        caption += f", strength {comparison.strengths[0]:g}"
    if is_difference:
        caption += f"; differences to the base x {AMPLIFIED}"
    labels = [title if title == "Base" else f"{title}\n{name}" for title, name in comparison.titles]
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    labelled_grid(images, [row.label for row in rows], labels, _EXPORT_CELL, caption).save(aside, "PNG")
    aside.replace(path)
    return path


def difference(image: Image.Image, base: Image.Image) -> Image.Image:
    """|image - base| of two RGB images of one size, amplified."""
    return ImageChops.difference(image, base).point([min(255, value * AMPLIFIED) for value in range(256)] * 3)


def _line(comparison: Comparison, row: GridRow, found: Mapping[Picture, Path], is_difference: bool) -> str:
    base = found.get(row.pictures[0])
    cells = []
    for place, (picture, (title, name)) in enumerate(zip(row.pictures, comparison.titles, strict=True)):
        path = found.get(picture)
        if path is None:
            cells.append('<div class="fl-cell fl-open">not drawn yet</div>')
            continue
        alt = escape(f"{title}, {name}: {row.label}")
        images = f'<img src="{file_url(path)}" alt="{alt}" draggable="false">'
        kind = "fl-cell"
        if is_difference and place and base is not None:
            kind = "fl-cell fl-diff"
            images += f'<img src="{file_url(base)}" alt="" draggable="false">'
        hint = "Click to zoom the whole row"
        cells.append(
            f'<div class="{kind}" tabindex="0" role="button" title="{hint}" aria-label="{alt}">{images}</div>'
        )
    return f'<div><p class="fl-label">{escape(row.label)}</p></div><div class="fl-line">{"".join(cells)}</div>'


def _images(row: GridRow, found: Mapping[Picture, Path], is_difference: bool) -> list[Image.Image]:
    images = [_opened(found[picture]) for picture in row.pictures]
    return [images[0], *(difference(image, images[0]) for image in images[1:])] if is_difference else images


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
