"""The page's CSS and JavaScript, read from `static/`."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "static"


def read_static(*names: str, **values: str) -> str:
    """Read files of `static/` one after the other, with `__NAME__` replaced by the value of `NAME`."""
    text = "".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)
    for name, value in values.items():
        text = text.replace(f"__{name}__", value)
    return text
