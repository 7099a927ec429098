"""WD14 taggers: `model.onnx` gives the probability of each tag in `selected_tags.csv`; run by onnxruntime."""

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
_GENERAL, _CHARACTER = "0", "4"  # categories of tags; others, such as ratings, are ignored
_WORD = re.compile(r"[^\W\d_]{2}")


@dataclass(frozen=True)
class Thresholds:
    """The minimum probability of general tags and of character tags."""

    general: float = CaptionConfig.tag_threshold
    character: float = CaptionConfig.character_threshold


class TaggerFiles(NamedTuple):
    """The file of a tagger's tags, and a function that returns its model file."""

    tags: Path
    model: Callable[[], Path]


def find_tagger(name_or_path: str) -> TaggerFiles | None:
    """Find the files of a tagger in a folder or on the hub; None without a list of tags."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return TaggerFiles(folder / TAGS_FILE, lambda: folder / MODEL_FILE) if (folder / TAGS_FILE).is_file() else None
    try:
        tags = hf_hub_download(name_or_path, TAGS_FILE)
    except (OSError, ValueError):  # no such file or repository; reported by the next loader
        return None
    return TaggerFiles(Path(tags), lambda: Path(hf_hub_download(name_or_path, MODEL_FILE)))


def load_tagger(
    name: str, files: TaggerFiles, thresholds: Thresholds
) -> Callable[[Sequence[Image.Image]], list[list[str]]]:
    """Load a function from images to their tags: characters first, then by probability.

    Raises ConfigError, with `name` in the message, if it cannot be loaded.
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
            f"captioner {name!r} has inputs of shape {pixels.shape}, not (images, side, side, 3) as a WD14 tagger"
        )

    def tag_images(images: Sequence[Image.Image]) -> list[list[str]]:
        # One by one, because older models have no batch dimension.
        rows = [session.run([scores.name], {pixels.name: tagger_input(image, side)})[0][0] for image in images]
        if any(len(row) != len(tags) for row in rows):
            raise ConfigError(f"captioner {name!r} gives {len(rows[0])} scores, but {TAGS_FILE} has {len(tags)} tags")
        return [likely_tags(tags, row.tolist(), thresholds) for row in rows]

    return tag_images


def tagger_input(image: Image.Image, side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Pad the image to a white square, as in training of the taggers: (1, side, side, 3), BGR, 0 to 255."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(image.convert("RGB"), ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square, dtype=np.float32)[None, :, :, ::-1])


def likely_tags(tags: Sequence[tuple[str, str]], scores: Sequence[float], thresholds: Thresholds) -> list[str]:
    """Return the tags, (name, category) each, whose score exceeds their threshold, as words."""
    chosen: list[str] = []
    for category, threshold in ((_CHARACTER, thresholds.character), (_GENERAL, thresholds.general)):
        rows = [(score, name) for (name, kind), score in zip(tags, scores, strict=True) if kind == category]
        chosen += [as_words(name) for score, name in sorted(rows, key=lambda row: -row[0]) if score > threshold]
    return chosen


def as_words(tag: str) -> str:
    """Return `long hair` for `long_hair`; emoticons such as `^_^` or `x_x` are unchanged."""
    return tag.replace("_", " ") if _WORD.search(tag) else tag


def _read_tags(path: Path) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [(row["name"], row["category"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as a tagger's tags, which have a name and a category") from error


def _session(captioner: str, files: TaggerFiles) -> Any:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    try:
        return onnxruntime.InferenceSession(str(files.model()), providers=providers)
    except Exception as error:  # onnxruntime's errors have no common base class
        reason = first_line(error)
        raise ConfigError(f"the {MODEL_FILE} of captioner {captioner!r} cannot be loaded: {reason}") from error
