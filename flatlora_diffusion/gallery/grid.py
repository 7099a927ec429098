"""A labelled grid of images, legible at a glance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _FAINT = "#1f2328", "white", "#59636e"
_MOST_LINES = 8


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell: int = 192,
    caption: str = "",
) -> Image.Image:
    """`rows` of equally many images, each scaled to `cell` pixels, with labels at the left and on top.

    Labels and caption are broken into lines that fit their place, after 8 of them cut.
    """
    small, large = ImageFont.load_default(16), ImageFont.load_default(24)
    gap, columns = 8, len(column_labels)
    column_texts = [wrapped(label, small, cell) for label in column_labels]
    # Large letters if all labels are short.
    row_font = large if all(large.getlength(label) <= 122 for label in row_labels) else small
    row_texts = [wrapped(label, row_font, cell) for label in row_labels]
    widest = max(_size(text, row_font)[0] for text in row_texts)
    left, top = max(150, widest + 28), 22 + max(_size(text, small)[1] for text in column_texts)
    width = left + columns * (cell + gap)
    caption_text = wrapped(caption, small, width - 2 * gap)
    bottom = 24 + _size(caption_text, small)[1] if caption else gap
    canvas = Image.new("RGB", (width, top + len(rows) * (cell + gap) + bottom), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(column_texts):
        middle = left + column * (cell + gap) + cell // 2
        draw.multiline_text((middle, top - 6), text, _INK, small, anchor="md", align="center")
    for row, (text, images) in enumerate(zip(row_texts, rows, strict=True)):
        y = top + row * (cell + gap)
        draw.multiline_text((left - 14, y + cell // 2), text, _INK, row_font, anchor="rm", align="right")
        for column, image in enumerate(images):
            enlarged = image.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (left + column * (cell + gap), y))
    if caption:
        x = left if _size(caption_text, small)[0] <= width - left - gap else gap
        draw.multiline_text((x, canvas.height - 12), caption_text, _FAINT, small, anchor="ld")
    return canvas


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text` in lines of at most `width` pixels, broken between words, or inside of one that is wider by itself."""
    lines = [line for paragraph in text.splitlines() for line in _lines(paragraph, font, width)]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], "..."]
    return "\n".join(lines)


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Iterator[str]:
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


def _size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    """Width and height in pixels of text in lines."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font)
    return round(right - left), round(bottom - top)
