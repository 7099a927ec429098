"""A labelled grid of images, legible at a glance."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER = "#1f2328", "white"


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell: int = 192,
    caption: str = "",
) -> Image.Image:
    """`rows` of equally many images, each scaled to `cell` pixels, with labels at the left and on top."""
    labels = [textwrap.fill(label, cell // 8) for label in column_labels]
    gap, left, top = 8, 150, 14 + 20 * max(label.count("\n") + 1 for label in labels)
    bottom = 40 if caption else gap
    columns = len(column_labels)
    size = (left + columns * (cell + gap), top + len(rows) * (cell + gap) + bottom)
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    small, large = ImageFont.load_default(16), ImageFont.load_default(24)
    for column, label in enumerate(labels):
        middle = left + column * (cell + gap) + cell // 2
        draw.multiline_text((middle, top - 6), label, _INK, small, anchor="md", align="center")
    for row, (label, images) in enumerate(zip(row_labels, rows, strict=True)):
        y = top + row * (cell + gap)
        draw.text((left - 14, y + cell // 2), label, _INK, large, anchor="rm")
        for column, image in enumerate(images):
            enlarged = image.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (left + column * (cell + gap), y))
    if caption:
        draw.text((left, size[1] - 12), caption, "#59636e", small, anchor="ls")
    return canvas
