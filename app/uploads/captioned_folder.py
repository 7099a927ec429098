"""One folder of uploaded images: `0001.png` with its caption in `0001.txt`."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from flatlora_diffusion.storage.atomic_io import file_sha256, write_text

_IMAGE = re.compile(r"\d{4,}\.(?!txt$|part$)[a-z0-9]+")


def images_of(folder: Path) -> list[Path]:
    """The images in the order they came."""
    return sorted(path for path in folder.iterdir() if _IMAGE.fullmatch(path.name))


def read_texts(path: Path) -> dict[str, str]:
    """Texts by image name; empty if the file is missing."""
    texts: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return texts


def caption_of(image: Path) -> str:
    """The caption; empty if there is none."""
    path = image.with_suffix(".txt")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def write_caption(image: Path, text: str) -> None:
    """Write the caption; an empty one is removed."""
    path = image.with_suffix(".txt")
    if not text:
        path.unlink(missing_ok=True)
        return
    write_text(path, text)


def version_of(image: Path) -> str:
    """Changes with the image or its caption; read it before the caption."""
    return hashlib.sha256(f"{image.stat().st_mtime_ns} {caption_of(image)}".encode()).hexdigest()[:12]


def content_of(folder: Path) -> str:
    """A hash of the images and captions, the same for the same."""
    content = hashlib.sha256()
    for path in files_of(folder):
        content.update(f"{path.name} {file_sha256(path)}\n".encode())
    return content.hexdigest()[:16]


def files_of(folder: Path) -> list[Path]:
    """The images and captions."""
    return [*images_of(folder), *sorted(folder.glob("*.txt"))]
