"""Small pieces of HTML."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote


def empty_page(title: str, text: str) -> str:
    """A placeholder with a title and advice."""
    return f'<div class="fl-empty"><b>{escape(title)}</b>{escape(text)}</div>'


def file_url(path: Path) -> str:
    """Where the page gets a file of the runs folder; relative, so that it holds behind a proxy."""
    return f"gradio_api/file={quote(path.resolve().as_posix())}"
