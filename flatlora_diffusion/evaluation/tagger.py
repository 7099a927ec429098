"""A tagger of the WD14 kind: `model.onnx` says how likely each tag of `selected_tags.csv` is; run by onnxruntime."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import hf_hub_download
from PIL import Image

from flatlora_diffusion.config import CaptionConfig, ConfigError
from flatlora_diffusion.storage.formatting import first_line

MODEL_FILE, TAGS_FILE = "model.onnx", "selected_tags.csv"
_GENERAL, _CHARACTER = "0", "4"  # the categories of a tag; others, such as ratings, are no caption
_WORD = re.compile(r"[^\W\d_]{2}")


@dataclass(frozen=True)
class Thresholds:
    """How likely a tag has to be, from 0 to 1."""

    general: float = CaptionConfig.tag_threshold
    character: float = CaptionConfig.character_threshold


class TaggerFiles(NamedTuple):
    """Where a tagger's tags are, and how its model is found."""

    tags: Path
    model: Callable[[], Path]


def find_tagger(name_or_path: str) -> TaggerFiles | None:
    """The files of the tagger in a folder or on the hub; None for what has no list of tags."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return TaggerFiles(folder / TAGS_FILE, lambda: folder / MODEL_FILE) if (folder / TAGS_FILE).is_file() else None
    try:
        tags = hf_hub_download(name_or_path, TAGS_FILE)
    except (OSError, ValueError):  # no such file, no such repository, no hub, no hub id: told by what looks next
        return None
    return TaggerFiles(Path(tags), lambda: Path(hf_hub_download(name_or_path, MODEL_FILE)))


def load_tagger(
    name: str, files: TaggerFiles, thresholds: Thresholds
) -> Callable[[Sequence[Image.Image]], list[list[str]]]:
    """A function from images to their tags: characters first, then the likeliest.

    Raises ConfigError, naming it by `name`, when it cannot be loaded.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ConfigError(
            f"captioner {name!r} is a tagger, which needs the package onnxruntime: "
            'pip install "flatlora-diffusion[captions]"'
        )
    tags = _read_tags(files.tags)
    session = _session(name, files)
    (pixels,), (scores, *_) = session.get_inputs(), session.get_outputs()
    side = pixels.shape[1]
    if len(pixels.shape) != 4 or pixels.shape[3] != 3 or not isinstance(side, int) or side != pixels.shape[2]:
        raise ConfigError(
            f"captioner {name!r} reads pixels of shape {pixels.shape}, not (images, side, side, 3) as a WD14 tagger"
        )

    def found(images: Sequence[Image.Image]) -> list[list[str]]:
        """One by one: older models take no batch."""
        rows = [session.run([scores.name], {pixels.name: pixels_of(image, side)})[0][0] for image in images]
        if any(len(row) != len(tags) for row in rows):
            raise ConfigError(f"captioner {name!r} gives {len(rows[0])} scores, and {TAGS_FILE} has {len(tags)} tags")
        return [likely_tags(tags, row.tolist(), thresholds) for row in rows]

    return found


def pixels_of(image: Image.Image, side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The image in the middle of a white square, as such a model was trained: (1, side, side, 3), BGR, 0 to 255."""
    long = max(image.size)
    square = Image.new("RGB", (long, long), "white")
    square.paste(image.convert("RGB"), ((long - image.width) // 2, (long - image.height) // 2))
    if long != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square, dtype=np.float32)[None, :, :, ::-1])


def likely_tags(tags: Sequence[tuple[str, str]], scores: Sequence[float], thresholds: Thresholds) -> list[str]:
    """The tags, (name, category) each, whose score is above their threshold, as words."""
    chosen: list[str] = []
    for category, least in ((_CHARACTER, thresholds.character), (_GENERAL, thresholds.general)):
        rows = [(score, name) for (name, kind), score in zip(tags, scores, strict=True) if kind == category]
        chosen += [as_words(name) for score, name in sorted(rows, key=lambda row: -row[0]) if score > least]
    return chosen


def as_words(tag: str) -> str:
    """`long_hair` as `long hair`; a face such as `^_^` or `x_x`, which has no word in it, stays."""
    return tag.replace("_", " ") if _WORD.search(tag) else tag


def _read_tags(path: Path) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [(row["name"], row["category"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as a tagger's tags, which have a name and a category") from error


def _session(name: str, files: TaggerFiles) -> Any:
    import onnxruntime

    here = onnxruntime.get_available_providers()
    providers = [one for one in ("CUDAExecutionProvider", "CPUExecutionProvider") if one in here]
    try:
        return onnxruntime.InferenceSession(str(files.model()), providers=providers)
    except Exception as error:  # onnxruntime's own are of no common kind
        line = first_line(error)
        raise ConfigError(f"the {MODEL_FILE} of captioner {name!r} cannot be loaded: {line}") from error
