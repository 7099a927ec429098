"""Thumbnails of uploaded images as the trainer sees them, and their properties, cached by content."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.crops import choose_view, view_image
from flatlora_diffusion.data.dataset import Sample, make_sample
from flatlora_diffusion.data.images import load_alpha, load_image
from flatlora_diffusion.storage.atomic_io import atomic_write, file_sha256

from ..uploads.decoding import DECODING

MAX_SIDE = 256


@dataclass(frozen=True)
class ImageFacts:
    """An image's sample without its caption, and whether something of it is transparent."""

    sample: Sample
    is_transparent: bool


class Thumbnails:
    """The thumbnails in `folder`; they are found again after a restart. Safe under several threads and processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._looks: dict[tuple[str, str], ImageFacts] = {}
        self._lock = threading.Lock()

    def inspect(self, path: Path) -> ImageFacts:
        """The properties of the image at `path`; decoded once for the same content."""
        key = (path.name, file_sha256(path))
        with self._lock:
            known = self._looks.get(key)
        if known is None:
            with DECODING:
                known = _look(path)
            with self._lock:
                self._looks[key] = known
        return known

    def picture(self, path: Path, sha256: str, background: str, size: tuple[int, int]) -> Image.Image:
        """The centre crop of the image to `size` (height, width), shrunk. Raises ConfigError for a bad colour."""
        key = hashlib.sha256(f"{sha256} {background} {size} {MAX_SIDE}".encode()).hexdigest()
        kept = self.folder / f"{key}.png"
        if kept.is_file():
            with Image.open(kept) as file:
                return file.convert("RGB")
        with DECODING:
            picture = as_trained(path, background, size)
        with suppress(OSError):  # on a full disk the images are to be seen all the same
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(kept) as aside:
                picture.save(aside, "PNG")
        return picture


def _look(path: Path) -> ImageFacts:
    alpha = load_alpha(path)
    is_transparent = alpha.histogram()[255] < alpha.width * alpha.height
    del alpha  # before the image is decoded
    return ImageFacts(make_sample(path.name, path, ""), is_transparent)


def as_trained(path: Path, background: str, size: tuple[int, int]) -> Image.Image:
    """The centre crop at the training size, by the trainer's own functions; shrunk to a thumbnail."""
    image = load_image(path, background)
    view = choose_view((image.height, image.width), size, True, False, torch.Generator())
    picture = view_image(image, view, TrainConfig().data.image_interpolation_mode)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture
