"""The uploaded images as the trainer will see them, with notes on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.data.dataset import SampleSet
from flatlora_diffusion.data.images import load_image
from flatlora_diffusion.families.registry import family_of

from ..uploads.captioned_folder import caption_of, version_of
from ..uploads.decoding import DECODING
from ..uploads.uploads import Uploads
from .thumbnails import Thumbnails

Captioner = Callable[[Sequence[Image.Image]], list[str]]
_CAPTIONED_AT_ONCE = 4


@dataclass(frozen=True)
class Card:
    """One image: its training view, file name, caption with version, and notes.

    Attributes:
        content: changes when another image gets the same number.
    """

    image: str
    content: str
    name: str
    picture: Image.Image
    caption: str
    version: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Framing:
    """How images are cropped: to squares of `size` pixels, or to the nearest bucket of multiples of `bucket_step`."""

    background: str
    size: int
    bucket_step: int | None = None

    def sizes(self, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The training size of each image; all are (height, width)."""
        if self.bucket_step is None:
            return [(self.size, self.size)] * len(shapes)
        from flatlora_diffusion.data.schedule import bucket_sizes  # imports diffusers, which takes seconds

        return bucket_sizes(shapes, self.size, self.bucket_step)


def training_size(model: ModelConfig, resolution: int | None) -> int:
    """The training resolution in pixels; for None the base's own, from its configs."""
    if resolution is not None:
        return resolution
    return family_of(model).sizes(model).native


def framing(model: ModelConfig, resolution: int | None, background: str, has_buckets: bool) -> Framing:
    """How the trainer frames the images for the base `model`."""
    size = training_size(model, resolution)
    if not has_buckets:
        return Framing(background, size)
    return Framing(background, size, family_of(model).sizes(model).step)


def load_view(uploads: Uploads, thumbnails: Thumbnails, session: str, framed: Framing) -> list[Card]:
    """The cards of a session's images, in the order they came. Raises ConfigError for a bad colour."""
    images, names = uploads.images(session), uploads.names(session)
    looks = [thumbnails.inspect(path) for path in images]
    samples = [look.sample for look in looks]
    twins = dict(SampleSet(samples, 0, []).duplicates())
    sizes = framed.sizes([(sample.height, sample.width) for sample in samples])
    cards = []
    for path, look, size in zip(images, looks, sizes, strict=True):
        sample, version, caption = look.sample, version_of(path), caption_of(path)
        notes = [] if framed.bucket_step is None else [f"bucket {size[1]} x {size[0]}"]
        if sample.height < size[0] or sample.width < size[1]:
            notes.append(f"small: {sample.width} x {sample.height}, will be enlarged to {size[1]} x {size[0]}")
        if path.name in twins:
            notes.append(f"looks like {names[twins[path.name]]}")
        if look.is_transparent:
            notes.append(f"transparent: put on {framed.background}")
        if not caption:
            notes.append("no caption")
        picture = thumbnails.picture(path, sample.sha256, framed.background, size)
        cards.append(Card(path.name, sample.sha256[:12], names[path.name], picture, caption, version, tuple(notes)))
    return cards


def fill_captions(
    uploads: Uploads, session: str, captioner: Captioner, on_progress: Callable[[int, int], None]
) -> int:
    """Caption the images without a caption, and return how many.

    Each batch is saved, so that an interruption loses little.

    Args:
        on_progress: called with the number of images done and in total.
    """
    captions = uploads.captions(session)
    bare = [path for path in uploads.images(session) if not captions[path.name]]
    for first in range(0, len(bare), _CAPTIONED_AT_ONCE):
        paths = bare[first : first + _CAPTIONED_AT_ONCE]
        texts = captioner([_decoded(path) for path in paths])
        still_bare = {name for name, text in uploads.captions(session).items() if not text}  # as it is after the wait
        made = {path.name: text for path, text in zip(paths, texts, strict=True)}
        uploads.save_captions(session, {name: text for name, text in made.items() if name in still_bare}, first > 0)
        on_progress(first + len(paths), len(bare))
    return len(bare)


def _decoded(path: Path) -> Image.Image:
    with DECODING:
        return load_image(path)
