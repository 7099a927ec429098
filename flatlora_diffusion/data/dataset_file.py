"""Several folders with repeats and prompts of their own, from a dataset file (TOML) as sd-scripts has them."""

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

# What else such files say, and the flag that says it here, for all images alike.
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
    """One folder: its images are shown `repeats` times per epoch; `prompt` is for those without a caption."""

    folder: Path
    repeats: int
    prompt: str | None
    prefix: str
    suffix: str

    def captioned(self, caption: str) -> str:
        return " ".join(part for part in (self.prefix, caption, self.suffix) if part)


def load_dataset_file(path: Path, instance_prompt: str | None) -> SampleSet:
    """The images of all folders of the file, called FOLDER/NAME.

    A folder's `class_tokens`, or else `instance_prompt`, is the caption of its images without one. What the file says
    of the whole run is told as the flags that say it here. Raises ConfigError for a file that cannot be used.
    """
    subsets, left_out = read_dataset_file(path)
    if left_out:
        flags = ", ".join(f"{name} = {value} (--{_FLAGS[name]})" for name, value in left_out.items())
        logger.info("%s also says what flags say here, for all images alike: %s", path.name, flags)
    names = Counter(subset.folder.name for subset in subsets)
    samples: list[Sample] = []
    captioned, skipped = 0, []
    for number, subset in enumerate(subsets, start=1):
        label = subset.folder.name if names[subset.folder.name] == 1 else f"{number}-{subset.folder.name}"
        found = load_samples(subset.folder, subset.prompt or instance_prompt)
        captioned += found.captioned
        skipped += [(f"{label}/{name}", reason) for name, reason in found.skipped]
        samples += [
            replace(
                sample,
                id=f"{label}/{sample.id}",
                caption=subset.captioned(sample.caption),
                repeats=subset.repeats,
            )
            for sample in found.samples
        ]
    return SampleSet(samples, captioned, skipped)


def read_dataset_file(path: Path) -> tuple[list[Subset], dict[str, Any]]:
    """The folders that the file lists, and what else it says, by its names. Raises ConfigError with the place of a
    mistake."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"dataset_config={str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"dataset_config={str(path)!r} is no TOML file: {error}") from error
    subsets: list[Subset] = []
    left_out: dict[str, Any] = {}
    for where, values in _tables(path, content):
        left_out |= {name: value for name, value in values.items() if name in _FLAGS}
        subsets.append(_subset(path, where, values))
    if not subsets:
        raise ConfigError(f"dataset_config={str(path)!r} lists no folder; add [[datasets.subsets]] with image_dir")
    return subsets, left_out


def _tables(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each subset by its place, with what its dataset and the whole file say over it."""
    unknown = sorted(set(content) - {"general", "datasets"})
    if unknown:
        raise ConfigError(f"{path.name} has {', '.join(unknown)}; only [general] and [[datasets]] are known")
    general = content.get("general", {})
    for one, dataset in enumerate(_listed(path, content, "datasets"), start=1):
        shared = {name: value for name, value in dataset.items() if name != "subsets"}
        for two, subset in enumerate(_listed(path, dataset, "subsets"), start=1):
            yield f"{path.name}, subset {two} of dataset {one}", {**general, **shared, **subset}


def _listed(path: Path, table: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = table.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ConfigError(f"{path.name}: {name} must be a list of tables, each begun with [[...]]")
    return found


def _subset(path: Path, where: str, values: Mapping[str, Any]) -> Subset:
    for name, kind in _KINDS.items():
        if name in values and not (isinstance(values[name], kind) and (kind is bool or values[name] is not True)):
            raise ConfigError(f"{where}: {name}={values[name]!r} must be {KIND_NAMES[kind]}")
    if "image_dir" not in values:
        raise ConfigError(f"{where} has no image_dir: give the folder of its images")
    if values.get("is_reg"):
        raise ConfigError(
            f"{where} has regularization images (is_reg): take it out and give --with_prior_preservation, "
            f"--class_data_dir {values['image_dir']!r} and --class_prompt"
        )
    if "metadata_file" in values:
        raise ConfigError(f"{where} has its captions in a metadata_file: write them into .txt files beside the images")
    ending = values.get("caption_extension", CAPTION_SUFFIXES[0])
    if f".{ending.lstrip('.')}" not in CAPTION_SUFFIXES:
        raise ConfigError(
            f"{where}: caption_extension={ending!r} is none of {', '.join(CAPTION_SUFFIXES)}; rename them"
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
    """A relative folder is beside the file, or else in the working folder, as sd-scripts has it."""
    folder = Path(name).expanduser()
    beside = path.parent / folder
    return beside if not folder.is_absolute() and beside.is_dir() else folder
