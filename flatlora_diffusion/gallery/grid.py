"""Labelled grids of images, legible at half their size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _FAINT = "#1f2328", "white", "#59636e"
_MAX_LINES = 8
_GAP, _BAND_GAP = 8, 24  # pixels between images and between bands
_SHORT = 122  # pixels: the width up to which row labels have large letters

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Band:
    """Rows of images, scaled to `cell` pixels, with labels at the left and optionally on top."""

    rows: Sequence[Sequence[Image.Image]]
    row_labels: Sequence[str]
    column_labels: Sequence[str] = ()
    cell: int = 192

    @property
    def width(self) -> int:
        """The width of the images in pixels."""
        return max(len(row) for row in self.rows) * (self.cell + _GAP)


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell: int,
    caption: str = "",
) -> Image.Image:
    """Draw rows of equally many images, scaled to `cell` pixels, with labels at the left and on top.

    Labels and caption are wrapped, and truncated after 8 lines.
    """
    return labelled_bands([Band(rows, row_labels, column_labels, cell)], caption)


def labelled_bands(bands: Sequence[Band], caption: str = "") -> Image.Image:
    """Draw bands below each other, aligned at the left, with a caption below."""
    small, large = ImageFont.load_default(18), ImageFont.load_default(24)
    labels = [label for band in bands for label in band.row_labels]
    row_font = large if all(large.getlength(label) <= _SHORT for label in labels) else small
    row_texts = [wrapped(label, row_font, 192) for label in labels]
    left = max(150, max(_size(text, row_font)[0] for text in row_texts) + 28)
    width = left + max(band.width for band in bands)
    tops = [_column_texts(band, small, large) for band in bands]
    heights = [_top(*top) + len(band.rows) * (band.cell + _GAP) for band, top in zip(bands, tops, strict=True)]
    caption_text = wrapped(caption, small, width - 2 * _GAP)
    bottom = 24 + _size(caption_text, small)[1] if caption else _GAP
    canvas = Image.new("RGB", (width, sum(heights) + _BAND_GAP * (len(bands) - 1) + bottom), _PAPER)
    draw = ImageDraw.Draw(canvas)
    y, texts = 0, iter(row_texts)
    for band, (columns, font), height in zip(bands, tops, heights, strict=True):
        first = y + _top(columns, font)
        for column, text in enumerate(columns):
            middle = left + column * (band.cell + _GAP) + band.cell // 2
            draw.multiline_text((middle, first - 8), text, _INK, font, anchor="md", align="center")
        for row, images in enumerate(band.rows):
            top = first + row * (band.cell + _GAP)
            draw.multiline_text(
                (left - 14, top + band.cell // 2), next(texts), _INK, row_font, anchor="rm", align="right"
            )
            for column, image in enumerate(images):
                scaled = image.convert("RGB").resize((band.cell, band.cell), Image.Resampling.LANCZOS)
                canvas.paste(scaled, (left + column * (band.cell + _GAP), top))
        y += height + _BAND_GAP
    if caption:
        x = left if _size(caption_text, small)[0] <= width - left - _GAP else _GAP
        draw.multiline_text((x, canvas.height - 12), caption_text, _FAINT, small, anchor="ld")
    return canvas


def _column_texts(band: Band, small: Font, large: Font) -> tuple[list[str], Font]:
    """Wrap the labels on top; the font is large if each needs at most two lines."""
    for font in (large, small):
        texts = [wrapped(label, font, band.cell) for label in band.column_labels]
        if all(text.count("\n") < 2 for text in texts):
            return texts, font
    return texts, small


def _top(texts: Sequence[str], font: Font) -> int:
    """Return the height of the labels on top."""
    return 24 + max(_size(text, font)[1] for text in texts) if texts else _GAP


def wrapped(text: str, font: Font, width: int) -> str:
    """Wrap `text` to lines of at most `width` pixels, between words or inside words that are too wide."""
    lines = [line for paragraph in text.splitlines() for line in _lines(paragraph, font, width)]
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], "..."]
    return "\n".join(lines)


def _lines(text: str, font: Font, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            yield line
        while len(word) > 1 and font.getlength(word) > width:
            fits = next(end for end in range(len(word) - 1, 0, -1) if end == 1 or font.getlength(word[:end]) <= width)
            yield word[:fits]
            word = word[fits:]
        line = word
    if line:
        yield line


def _size(text: str, font: Font) -> tuple[int, int]:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font)
    return round(right - left), round(bottom - top)
