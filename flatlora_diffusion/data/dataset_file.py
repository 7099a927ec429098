"""Dataset files (TOML) in the format of sd-scripts: several folders, each with its repeats and prompt."""

from __future__ import annotations

import logging
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flatlora_diffusion.config import KIND_NAMES, ConfigError
from flatlora_diffusion.data.dataset import Sample, SampleSet, load_samples
from flatlora_diffusion.data.images import CAPTION_SUFFIXES

logger = logging.getLogger(__name__)

# Settings of sd-scripts that are ignored in the file, and our flag for each, which applies to all images.
_FLAGS = {
    "resolution": "resolution",
    "batch_size": "train_batch_size",
    "enable_bucket": "use_aspect_ratio_buckets",
    "flip_aug": "random_flip",
    "random_crop": "center_crop",
    "shuffle_caption": "shuffle_tags",
    "keep_tokens": "keep_tags",
    "caption_tag_dropout_rate": "tag_dropout",
    "caption_dropout_rate": "caption_dropout",
    "alpha_mask": "alpha_mask_loss",
}
_KINDS: dict[str, type] = {
    "image_dir": str,
    "num_repeats": int,
    "class_tokens": str,
    "caption_extension": str,
    "caption_prefix": str,
    "caption_suffix": str,
    "is_reg": bool,
}
_MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Subset:
    """A folder; each image appears `repeats` times per epoch, `prompt` is for images without a caption."""

    folder: Path
    repeats: int
    prompt: str | None
    prefix: str
    suffix: str


def load_dataset_file(path: Path, instance_prompt: str | None) -> SampleSet:
    """Read the images of all folders of the file, with ids FOLDER/NAME.

    Images without a caption get their folder's `class_tokens`, or else `instance_prompt`. Settings of the whole run
    are ignored; a log line names the flags to use instead. Raises ConfigError for an invalid file.
    """
    subsets, ignored = read_dataset_file(path)
    if ignored:
        flags = ", ".join(f"{name} = {value} (--{_FLAGS[name]})" for name, value in ignored.items())
        logger.info("%s has settings that are ignored; use these flags, for all images: %s", path.name, flags)
    names = Counter(subset.folder.name for subset in subsets)
    samples: list[Sample] = []
    captioned, skipped = 0, []
    for number, subset in enumerate(subsets, start=1):
        label = subset.folder.name if names[subset.folder.name] == 1 else f"{number}-{subset.folder.name}"
        images = load_samples(subset.folder, subset.prompt or instance_prompt)
        captioned += images.captioned
        skipped += [(f"{label}/{name}", reason) for name, reason in images.skipped]
        samples += [
            replace(
                sample,
                id=f"{label}/{sample.id}",
                caption=" ".join(filter(None, (subset.prefix, sample.caption, subset.suffix))),
                repeats=subset.repeats,
            )
            for sample in images.samples
        ]
    return SampleSet(samples, captioned, skipped)


def read_dataset_file(path: Path) -> tuple[list[Subset], dict[str, Any]]:
    """Return the folders in the file, and the ignored settings by name. Raises ConfigError for an invalid file."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"dataset_config={str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"dataset_config={str(path)!r} is not a TOML file: {error}") from error
    subsets: list[Subset] = []
    ignored: dict[str, Any] = {}
    for where, values in _tables(path, content):
        ignored |= {name: value for name, value in values.items() if name in _FLAGS}
        subsets.append(_subset(path, where, values))
    if not subsets:
        raise ConfigError(f"dataset_config={str(path)!r} lists no folder; add [[datasets.subsets]] with image_dir")
    return subsets, ignored


def _tables(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location and the settings of each subset, including those of its dataset and of [general]."""
    unknown = sorted(set(content) - {"general", "datasets"})
    if unknown:
        raise ConfigError(f"{path.name} has {', '.join(unknown)}; only [general] and [[datasets]] are supported")
    general = content.get("general", {})
    for number, dataset in enumerate(_table_list(path, content, "datasets"), start=1):
        shared = {name: value for name, value in dataset.items() if name != "subsets"}
        for index, subset in enumerate(_table_list(path, dataset, "subsets"), start=1):
            yield f"{path.name}, subset {index} of dataset {number}", {**general, **shared, **subset}


def _table_list(path: Path, table: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    tables = table.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(item, dict) for item in tables):
        raise ConfigError(f"{path.name}: {name} must be a list of tables, each with a header [[...]]")
    return tables


def _subset(path: Path, where: str, values: Mapping[str, Any]) -> Subset:
    for name, kind in _KINDS.items():
        if name in values and not (isinstance(values[name], kind) and (kind is bool or values[name] is not True)):
            raise ConfigError(f"{where}: {name}={values[name]!r} must be {KIND_NAMES[kind]}")
    if "image_dir" not in values:
        raise ConfigError(f"{where} has no image_dir: give the folder of its images")
    if values.get("is_reg"):
        raise ConfigError(
            f"{where} has regularization images (is_reg): remove it and give --with_prior_preservation, "
            f"--class_data_dir {values['image_dir']!r} and --class_prompt"
        )
    if "metadata_file" in values:
        raise ConfigError(f"{where} has its captions in a metadata_file: write them to .txt files beside the images")
    ending = values.get("caption_extension", CAPTION_SUFFIXES[0])
    if f".{ending.lstrip('.')}" not in CAPTION_SUFFIXES:
        raise ConfigError(
            f"{where}: caption_extension={ending!r} must be {' or '.join(CAPTION_SUFFIXES)}; rename the files"
        )
    repeats = values.get("num_repeats", 1)
    if not 1 <= repeats <= _MOST_REPEATS:
        raise ConfigError(f"{where}: num_repeats={repeats} is out of range: it must be between 1 and {_MOST_REPEATS}")
    return Subset(
        folder=_folder(path, values["image_dir"]),
        repeats=repeats,
        prompt=values.get("class_tokens"),
        prefix=values.get("caption_prefix", "").strip(),
        suffix=values.get("caption_suffix", "").strip(),
    )


def _folder(path: Path, name: str) -> Path:
    """Resolve a relative folder beside the file, or else in the working folder, as sd-scripts does."""
    folder = Path(name).expanduser()
    beside = path.parent / folder
    return beside if not folder.is_absolute() and beside.is_dir() else folder
