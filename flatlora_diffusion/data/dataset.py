"""Samples: a folder of images with captions."""

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

METADATA = "metadata.jsonl"
CAPTION_COLUMNS = ("text", "prompt", "caption")  # the first that a line has, unless one is named
LISTED = 5  # files that a message names before it only counts


@dataclass(frozen=True)
class Sample:
    """One training image; `id` is its file name, `width` and `height` are those of the upright image.

    `look` is a 64-bit difference hash: pictures that look alike differ in few bits. `repeats` is how often an epoch
    shows it. `mask` is the file beside it that says which of its pixels count.
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
    """The samples of a folder by name, how many have a caption of their own, and (name, reason) of each skip."""

    samples: list[Sample]
    captioned: int
    skipped: list[tuple[str, str]]

    @property
    def summary(self) -> str:
        """What will be trained on, to be shown before: `23 images, captions 20/23, skipped: notes.pdf (...)`."""
        count = len(self.samples)
        line = f"{count} image{'s' * (count != 1)}, captions {self.captioned}/{count}"
        sides = [(sample.width, sample.height) for sample in self.samples]
        small, large = min(sides, key=min), max(sides, key=min)
        line += f", {small[0]} x {small[1]}" + (f" to {large[0]} x {large[1]}" if large != small else "") + " pixels"
        masks = sum(sample.mask is not None for sample in self.samples)
        line += f", {masks} with a mask" if masks else ""
        if self.skipped:
            line += f"; skipped: {_listing(self.skipped)}"
        alike = self.duplicates()
        return line + (f"; look alike: {_listing(alike)}" if alike else "")

    def duplicates(self) -> list[tuple[str, str]]:
        """(name, name of an earlier image) of each image that looks like an earlier one."""
        found = []
        for place, sample in enumerate(self.samples):
            twin = next((other for other in self.samples[:place] if _is_alike(sample, other)), None)
            if twin is not None:
                found.append((sample.id, twin.id))
        return found


def load_samples(folder: Path, instance_prompt: str | None = None, caption_column: str | None = None) -> SampleSet:
    """The images directly in `folder` with their captions. Nothing in the folder is changed.

    An image's caption is that of its line in metadata.jsonl (field `caption_column`, or the first of CAPTION_COLUMNS),
    else the text of `NAME.txt` or `NAME.caption` beside it, else `instance_prompt`; an empty caption counts as none,
    as in diffusers. Raises ConfigError for a folder without readable images, an image without any caption, and
    metadata that does not fit the folder.
    """
    paths, skipped = find_images(folder)
    own = _captions(folder, paths, skipped, instance_prompt, caption_column)
    samples = [make_sample(path.name, path, own[path.name] or str(instance_prompt)) for path in paths]
    return SampleSet(samples, captioned=sum(map(bool, own.values())), skipped=skipped)


def check_samples(folder: Path, instance_prompt: str | None = None, caption_column: str | None = None) -> None:
    """Raises ConfigError as `load_samples`; of each image only the header is read, unless something is wrong."""
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
    """The caption that each image has of its own, by name. Raises ConfigError as `load_samples`."""
    if not paths:
        found = f": {_listing(skipped)}" if skipped else "; put the training images directly into it"
        raise ConfigError(f"image folder {folder} has no readable image{found}")
    own = own_captions(folder, paths, caption_column)
    bare = [name for name, caption in own.items() if not caption]
    if bare and not (instance_prompt and instance_prompt.strip()):
        have = "has" if len(bare) == 1 else f"and {len(bare) - 1} more have"
        raise ConfigError(
            f"{bare[0]} {have} no caption: "
            f"write one into {Path(bare[0]).stem}.txt beside it, or give an --instance_prompt"
        )
    return own


def own_captions(folder: Path, paths: Iterable[Path], caption_column: str | None = None) -> dict[str, str]:
    """The caption that each image in `folder` has of its own, by name; empty for one without."""
    listed = _metadata_captions(folder, caption_column)
    return {path.name: listed.get(path.name) or _sidecar_caption(path) for path in paths}


def manifest(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """What a run was trained on, for its folder: names, hashes and sizes, no captions and no absolute paths."""
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
    """The sample of an image that is known to be readable."""
    image = load_image(source)  # a header's size is not always that of the upright image
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
    """64 bits: whether each of 8 x 8 grey pixels is brighter than its right neighbour."""
    grey = list(image.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes())
    bits = [grey[9 * row + column] > grey[9 * row + column + 1] for row in range(8) for column in range(8)]
    return sum(bit << place for place, bit in enumerate(bits))


def _is_alike(one: Sample, two: Sample) -> bool:
    # A blank picture has no look, so only its content can tell.
    return one.sha256 == two.sha256 or (bool(one.look) and (one.look ^ two.look).bit_count() <= 2)


def _sidecar_caption(path: Path) -> str:
    """The text beside an image, on one line; empty if there is none."""
    for suffix in CAPTION_SUFFIXES:
        sidecar = path.with_suffix(suffix)
        if sidecar.is_file() and (caption := " ".join(_text(sidecar).split())):
            return caption
    return ""


def _metadata_captions(folder: Path, caption_column: str | None) -> dict[str, str]:
    """Caption by file name from metadata.jsonl; empty without that file."""
    path = folder / METADATA
    if not path.is_file():
        if caption_column is not None:
            raise ConfigError(f"caption_column={caption_column} needs a {METADATA}, and {folder} has none")
        return {}
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, caption = _metadata_line(line, f"{METADATA} line {number}", caption_column)
        if name in captions:
            raise ConfigError(f"{METADATA} line {number} names {name} a second time: keep one line per image")
        if Path(name).name != name or not (folder / name).is_file():
            raise ConfigError(f"{METADATA} line {number} names {name}, which is not in {folder}: correct or delete it")
        captions[name] = caption
    return captions


def _metadata_line(line: str, where: str, caption_column: str | None) -> tuple[str, str]:
    """(file name, caption) of one line; the caption is empty if the line has none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ConfigError(f'{where} must be an object with a "file_name" of an image in the folder')
    if caption_column is not None and caption_column not in row:
        raise ConfigError(f"caption_column={caption_column} is not in {where}, which has: {', '.join(row)}")
    column = caption_column or next((name for name in CAPTION_COLUMNS if name in row), None)
    caption = row[column] if column else ""
    if not isinstance(caption, str | None):
        raise ConfigError(f'{where}: "{column}" must be a text')
    return row["file_name"], " ".join((caption or "").split())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8 text: save it as UTF-8") from error


def _listing(skipped: list[tuple[str, str]]) -> str:
    shown = ", ".join(f"{name} ({reason})" for name, reason in skipped[:LISTED])
    return shown + (f" and {len(skipped) - LISTED} more" if len(skipped) > LISTED else "")


_LEADING_ON = frozenset(
    ["a", "an", "the", "of", "with", "in", "on", "at", "by", "for", "from", "to", "and", "or", "showing", "depicting"]
)


def shared_words(captions: Sequence[str]) -> str:
    """The words that all captions begin and end with, such as `a TOK icon, in the style of TOK`.

    Empty for fewer than two captions. Articles and prepositions at the end of the first part, which lead on to what
    an image shows, are left out.
    """
    words = [caption.split() for caption in captions]
    if len(words) < 2:
        return ""
    first = _shared_start(words)
    last = _shared_start([row[len(first) :][::-1] for row in words])[::-1]
    while first and first[-1].lower() in _LEADING_ON:
        first.pop()
    parts = [" ".join(part).strip(" ,.;") for part in (first, last)]
    return ", ".join(part for part in parts if part)


def _shared_start(rows: Sequence[list[str]]) -> list[str]:
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]
