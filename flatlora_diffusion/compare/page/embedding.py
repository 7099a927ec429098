"""Embeds picture files in the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

_MAX_PNG_BYTES = 400_000  # larger pictures are embedded as JPEG; two dozen of SDXL would take 45 MB as PNG


def data_uri(folder: Path, file: str | None) -> str:
    """The picture as a data URI; empty if it is missing or outside `folder`."""
    path = (folder / (file or "")).resolve()
    if not path.is_file() or not path.is_relative_to(folder.resolve()):
        return ""
    if path.stat().st_size <= _MAX_PNG_BYTES:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
