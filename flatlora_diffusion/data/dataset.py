"""Samples: the images of a folder with their captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.data.images import CAPTION_SUFFIXES, Source, find_images, load_image, mask_beside
from flatlora_diffusion.storage.atomic_io import file_sha256
from flatlora_diffusion.storage.formatting import count_text

METADATA = "metadata.jsonl"
CAPTION_COLUMNS = ("text", "prompt", "caption")  # in order of preference, unless caption_column is set
_LISTED = 5  # file names in a message before the rest is only counted


@dataclass(frozen=True)
class Sample:
    """A training image.

    id: file name; width, height: of the upright image; look: 64-bit difference hash, which differs in few bits between
    similar pictures; repeats: how often it appears in an epoch; mask: file with the loss weights of its pixels.
    """

    id: str
    source: Source
    caption: str
    sha256: str
    width: int
    height: int
    look: int
    repeats: int = 1
    mask: Path | None = None


@dataclass(frozen=True)
class SampleSet:
    """Samples sorted by name, how many have their own caption, and (name, reason) of each skipped file."""

    samples: list[Sample]
    captioned: int
    skipped: list[tuple[str, str]]

    @property
    def summary(self) -> str:
        """A summary such as `23 images, captions 20/23, ...; skipped: notes.pdf (...)`."""
        count = len(self.samples)
        line = f"{count_text(count, 'image')}, captions {self.captioned}/{count}"
        sides = [(sample.width, sample.height) for sample in self.samples]
        small, large = min(sides, key=min), max(sides, key=min)
        line += f", {small[0]} x {small[1]}" + (f" to {large[0]} x {large[1]}" if large != small else "") + " pixels"
        masks = sum(sample.mask is not None for sample in self.samples)
        line += f", {masks} with a mask" if masks else ""
        if self.skipped:
            line += f"; skipped: {_listing(self.skipped)}"
        duplicates = self.duplicates()
        return line + (f"; look alike: {_listing(duplicates)}" if duplicates else "")

    def duplicates(self) -> list[tuple[str, str]]:
        """Return (name, name of an earlier image) of each image that looks like an earlier one."""
        pairs = []
        for index, sample in enumerate(self.samples):
            earlier = next((other for other in self.samples[:index] if _looks_like(sample, other)), None)
            if earlier is not None:
                pairs.append((sample.id, earlier.id))
        return pairs


def load_samples(folder: Path, instance_prompt: str | None = None, caption_column: str | None = None) -> SampleSet:
    """Read the images directly in `folder` with their captions.

    The caption of an image is, in this order: its line in metadata.jsonl (field `caption_column`, or the first of
    CAPTION_COLUMNS), the text of `NAME.txt` or `NAME.caption`, `instance_prompt`. Empty captions are ignored, as in
    diffusers.

    Raises:
        ConfigError: there are no readable images, an image has no caption, or the metadata does not fit the folder.
    """
    paths, skipped = find_images(folder)
    captions = _captions(folder, paths, skipped, instance_prompt, caption_column)
    samples = [make_sample(path.name, path, captions[path.name] or str(instance_prompt)) for path in paths]
    return SampleSet(samples, captioned=sum(map(bool, captions.values())), skipped=skipped)


def check_samples(folder: Path, instance_prompt: str | None = None, caption_column: str | None = None) -> None:
    """Raise ConfigError as `load_samples` does, but read only the images' headers unless there is a problem."""
    try:
        _captions(folder, *find_images(folder, only_headers=True), instance_prompt, caption_column)
    except ConfigError:
        load_samples(folder, instance_prompt, caption_column)  # a damaged image is skipped, and needs no caption


def _captions(
    folder: Path,
    paths: Sequence[Path],
    skipped: list[tuple[str, str]],
    instance_prompt: str | None,
    caption_column: str | None,
) -> dict[str, str]:
    """Return each image's own caption by name, empty without one. Raises ConfigError as `load_samples`."""
    if not paths:
        details = f": {_listing(skipped)}" if skipped else "; put the training images directly into it"
        raise ConfigError(f"image folder {folder} has no readable image{details}")
    captions = own_captions(folder, paths, caption_column)
    uncaptioned = [name for name, caption in captions.items() if not caption]
    if uncaptioned and not (instance_prompt and instance_prompt.strip()):
        have = "has" if len(uncaptioned) == 1 else f"and {len(uncaptioned) - 1} more have"
        raise ConfigError(
            f"{uncaptioned[0]} {have} no caption: "
            f"write it to {Path(uncaptioned[0]).stem}.txt beside the image, or give an --instance_prompt"
        )
    return captions


def own_captions(folder: Path, paths: Iterable[Path], caption_column: str | None = None) -> dict[str, str]:
    """Return each image's own caption by name, from metadata.jsonl or a text file; empty without one."""
    captions = _metadata_captions(folder, caption_column)
    return {path.name: captions.get(path.name) or _sidecar_caption(path) for path in paths}


def manifest(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Describe training images for the run folder: names, hashes and sizes, without captions and absolute paths."""
    return [
        {
            "id": sample.id,
            "sha256": sample.sha256,
            "width": sample.width,
            "height": sample.height,
            "caption_sha256": hashlib.sha256(sample.caption.encode()).hexdigest(),
            **({"repeats": sample.repeats} if sample.repeats != 1 else {}),
            **({"mask_sha256": file_sha256(sample.mask)} if sample.mask else {}),
        }
        for sample in samples
    ]


def make_sample(name: str, source: Source, caption: str) -> Sample:
    """Create the sample of a readable image."""
    image = load_image(source)  # the header may have the size before rotation
    content = source.read_bytes() if isinstance(source, Path) else source
    sha256 = hashlib.sha256(content).hexdigest()
    return Sample(
        id=name,
        source=source,
        caption=caption.strip(),
        sha256=sha256,
        width=image.width,
        height=image.height,
        look=_difference_hash(image),
        mask=mask_beside(source) if isinstance(source, Path) else None,
    )


def _difference_hash(image: Image.Image) -> int:
    """Return 64 bits: whether each of 8 x 8 grey pixels is brighter than its right neighbour."""
    grey = list(image.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes())
    bits = [grey[9 * row + column] > grey[9 * row + column + 1] for row in range(8) for column in range(8)]
    return sum(bit << index for index, bit in enumerate(bits))


def _looks_like(sample: Sample, other: Sample) -> bool:
    # The difference hash of a blank picture is 0 and says nothing.
    return sample.sha256 == other.sha256 or (bool(sample.look) and (sample.look ^ other.look).bit_count() <= 2)


def _sidecar_caption(path: Path) -> str:
    """Return the text file beside an image on one line; empty without a file."""
    for suffix in CAPTION_SUFFIXES:
        sidecar = path.with_suffix(suffix)
        if sidecar.is_file() and (caption := " ".join(_text(sidecar).split())):
            return caption
    return ""


def _metadata_captions(folder: Path, caption_column: str | None) -> dict[str, str]:
    """Return captions by file name from metadata.jsonl; empty without that file."""
    if caption_column is not None and not (folder / METADATA).is_file():
        raise ConfigError(f"caption_column={caption_column} needs a {METADATA}, and {folder} has none")
    captions: dict[str, str] = {}
    for number, row in metadata_rows(folder).items():
        name, where = row["file_name"], f"{METADATA} line {number}"
        caption = _row_caption(row, where, caption_column)
        if name in captions:
            raise ConfigError(f"{where} names {name} a second time: keep one line per image")
        if Path(name).name != name or not (folder / name).is_file():
            raise ConfigError(f"{where} names {name}, which is not in {folder}: correct or delete it")
        captions[name] = caption
    return captions


def metadata_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of the folder's metadata.jsonl by line number; empty without that file.

    Each row has a `file_name`. Raises ConfigError for a line that is malformed.
    """
    path = folder / METADATA
    rows = {}
    for number, line in enumerate(_text(path).split("\n") if path.is_file() else (), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{METADATA} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ConfigError(
                f'{METADATA} line {number} must be an object with a "file_name" of an image in the folder'
            )
        rows[number] = row
    return rows


def _row_caption(row: dict[str, Any], where: str, caption_column: str | None) -> str:
    """Return the caption of a metadata row; empty without one."""
    if caption_column is not None and caption_column not in row:
        raise ConfigError(f"caption_column={caption_column} is not in {where}, which has: {', '.join(row)}")
    column = caption_column or next((name for name in CAPTION_COLUMNS if name in row), None)
    caption = row[column] if column else ""
    if not isinstance(caption, str | None):
        raise ConfigError(f'{where}: "{column}" must be a text')
    return " ".join((caption or "").split())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8 text: save it as UTF-8") from error


def _listing(files: list[tuple[str, str]]) -> str:
    listing = ", ".join(f"{name} ({reason})" for name, reason in files[:_LISTED])
    return listing + (f" and {len(files) - _LISTED} more" if len(files) > _LISTED else "")


_TRAILING_WORDS = frozenset(
    ["a", "an", "the", "of", "with", "in", "on", "at", "by", "for", "from", "to", "and", "or", "showing", "depicting"]
)


def shared_words(captions: Sequence[str]) -> str:
    """Return the words that all captions start and end with, such as `a TOK icon, in the style of TOK`.

    Articles and prepositions at the end of the first part are removed. Empty for fewer than two captions.
    """
    words = [caption.split() for caption in captions]
    if len(words) < 2:
        return ""
    first = _shared_start(words)
    last = _shared_start([row[len(first) :][::-1] for row in words])[::-1]
    while first and first[-1].lower() in _TRAILING_WORDS:
        first.pop()
    parts = [" ".join(part).strip(" ,.;") for part in (first, last)]
    return ", ".join(part for part in parts if part)


def _shared_start(rows: Sequence[list[str]]) -> list[str]:
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]
