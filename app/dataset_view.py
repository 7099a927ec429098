"""The uploaded images as the trainer will see them, with what to know about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from app.uploads import Uploads
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.dataset import SampleSet, make_sample
from flatlora_diffusion.images import load_alpha, load_image
from flatlora_diffusion.views import choose_view, view_image

_THUMBNAIL = 256


@dataclass(frozen=True)
class DatasetView:
    """`pictures`: (thumbnail, name) of each image; `rows`: image, file, caption, notes; `captioned` of them."""

    pictures: list[tuple[Image.Image, str]]
    rows: list[list[str]]
    captioned: int


def training_size(base: str, resolution: int | None) -> int:
    """The training size in pixels; a size that is left open is the base's own."""
    return resolution or (64 if base == "tiny" else 1024)


def look_at(uploads: Uploads, session: str, names: Mapping[str, str], background: str, size: int) -> DatasetView:
    """`names`: the user's own file names by image name. Raises ConfigError for a bad colour."""
    images, captions = uploads.images(session), uploads.captions(session)
    samples = SampleSet([make_sample(path.name, path, captions[path.name]) for path in images], 0, [])
    twins = dict(samples.duplicates())
    pictures, rows = [], []
    for path, sample in zip(images, samples.samples, strict=True):
        shown = names.get(path.name, path.name)
        notes = []
        if min(sample.width, sample.height) < size:
            notes.append(f"small: {sample.width} x {sample.height}, will be enlarged to {size}")
        if path.name in twins:
            notes.append(f"looks like {names.get(twins[path.name], twins[path.name])}")
        if load_alpha(path).histogram()[255] < sample.width * sample.height:
            notes.append(f"transparent: put on {background}")
        if not captions[path.name]:
            notes.append("no caption")
        pictures.append((as_trained(path, background, size), shown))
        rows.append([path.name, shown, captions[path.name], "; ".join(notes)])
    return DatasetView(pictures, rows, sum(bool(caption) for caption in captions.values()))


def as_trained(path: Path, background: str, size: int) -> Image.Image:
    """The centre crop at the training size, by the trainer's own functions; shrunk to a thumbnail."""
    image = load_image(path, background)
    view = choose_view((image.height, image.width), (size, size), True, False, torch.Generator())
    picture = view_image(image, view, TrainConfig().data.image_interpolation_mode)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture


def trigger_captions(names: Mapping[str, str], trigger: str) -> dict[str, str]:
    """`a TOK icon of fox, in the style of TOK` for `fox.png`, by image name."""
    words = {
        image: " ".join(Path(name).stem.replace("_", " ").replace("-", " ").split()) for image, name in names.items()
    }
    return {image: f"a {trigger} icon of {word}, in the style of {trigger}" for image, word in words.items()}
