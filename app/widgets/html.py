"""Small pieces of HTML, and the page's CSS and JavaScript from `static/`."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

_FOLDER = Path(__file__).parent / "static"


def empty_page(title: str, text: str) -> str:
    """A placeholder with a title and advice."""
    return f'<div class="fl-empty"><b>{escape(title)}</b>{escape(text)}</div>'


def file_url(path: Path) -> str:
    """Where the page gets a file of the runs folder; relative, so that it holds behind a proxy."""
    return f"gradio_api/file={quote(path.resolve().as_posix())}"


def data_url(picture: Image.Image, kind: str = "WEBP", quality: int = 85) -> str:
    """The picture in the page itself, without metadata, where no address may serve or name its file."""
    packed = io.BytesIO()
    picture.save(packed, kind, quality=quality)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(packed.getvalue()).decode()}"


def read_static(*names: str, **values: str) -> str:
    """Read files of `static/` one after the other, with `__NAME__` replaced by the value of `NAME`."""
    text = "".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)
    for name, value in values.items():
        text = text.replace(f"__{name}__", value)
    return text
