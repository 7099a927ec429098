"""The training set that the settings name: one folder, several in a dataset file, or a Hugging Face dataset."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flatlora_diffusion.config import ConfigError, DataConfig
from flatlora_diffusion.data.dataset import METADATA, Sample, SampleSet, check_samples, load_samples, make_sample
from flatlora_diffusion.data.dataset_file import load_dataset_file, read_dataset_file
from flatlora_diffusion.data.images import ImageError
from flatlora_diffusion.storage.hub_errors import loading_failure


def load_training_set(data: DataConfig) -> SampleSet:
    """The images and captions that `data` names. Raises ConfigError when there are none that can be used."""
    if data.dataset_name is not None:
        return load_hf_dataset(data)
    if data.dataset_config is not None:
        return load_dataset_file(Path(data.dataset_config), data.instance_prompt)
    if data.instance_data_dir is None:
        raise ConfigError("--instance_data_dir is missing: give the folder with the training images")
    return load_samples(Path(data.instance_data_dir), data.instance_prompt, data.caption_column)


def check_training_set(data: DataConfig) -> None:
    """Raises ConfigError for folders that `load_training_set` would refuse, without torch and, as a rule, at once.

    A Hugging Face dataset is not looked at.
    """
    if data.dataset_config is not None:
        for subset in read_dataset_file(Path(data.dataset_config))[0]:
            check_samples(subset.folder, subset.prompt or data.instance_prompt)
    elif data.instance_data_dir is not None:
        check_samples(Path(data.instance_data_dir), data.instance_prompt, data.caption_column)


def load_hf_dataset(data: DataConfig) -> SampleSet:
    """The images of the `train` split of `data.dataset_name`, in the dataset's order.

    A row's caption is that of `caption_column`, or the instance prompt if it has none or a blank one. Raises
    ConfigError when the dataset, its columns or its images cannot be used, or the package `datasets` is absent.
    """
    rows = _train_split(data)
    samples, skipped, bare = [], [], 0
    for index, row in enumerate(rows):
        name = f"row-{index:05d}"
        caption = _caption(row, data)
        image = row[data.image_column]
        content = image["bytes"]
        try:
            if content is None:
                with open(image["path"], "rb") as file:
                    content = file.read()
            samples.append(make_sample(name, content, caption or str(data.instance_prompt)))
            bare += not caption
        except (ImageError, OSError) as error:
            skipped.append((name, str(error)))
    if not samples:
        raise ConfigError(f"dataset_name={data.dataset_name!r} has no readable image in column {data.image_column!r}")
    if bare and not (data.instance_prompt and data.instance_prompt.strip()):
        where = f"{bare} of {len(samples)} images have no caption" if data.caption_column else "it names no captions"
        raise ConfigError(
            f"dataset_name={data.dataset_name!r}: {where}; give --caption_column or an --instance_prompt"
        )
    return SampleSet(samples, captioned=len(samples) - bare, skipped=skipped)


def held_out(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """The images to train on, and `count` that are not, both in their order.

    Their contents choose them, as good as by chance: all seeds and arms of a comparison leave out the same ones.
    Raises ConfigError when nothing is left to train on.
    """
    if count and count >= len(samples):
        raise ConfigError(
            f"holdout_images={count} leaves none of the {len(samples)} images to train on; give a lower number"
        )
    return _without(samples, sorted(samples, key=lambda sample: (sample.sha256, sample.id))[:count])


class Fold(NamedTuple):
    """One `of` so many parts of the images, numbered from 1 on."""

    number: int
    of: int


def parted(samples: Sequence[Sample], data: DataConfig, fold: Fold | None) -> tuple[list[Sample], list[Sample]]:
    """The images to train on and those that are held out: by a fold, or by --holdout_images."""
    return held_out(samples, data.holdout_images) if fold is None else fold_of(samples, *fold)


def fold_of(samples: Sequence[Sample], number: int, count: int) -> tuple[list[Sample], list[Sample]]:
    """The images that fold `number` of `count`, from 1 on, trains on, and those that it holds out, in their order.

    Each image is held out by one fold, the same by the same one in any order, and with its copies. Raises ConfigError
    for too few images.
    """
    contents = sorted({sample.sha256 for sample in samples})
    if count > len(contents):
        raise ConfigError(
            f"holdout_folds={count} is more than the {len(contents)} images, of which each fold holds out another "
            f"part; give at most {len(contents)}"
        )
    away = set(contents[number - 1 :: count])
    return _without(samples, [sample for sample in samples if sample.sha256 in away])


def _without(samples: Sequence[Sample], away: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The others, and those of `away`, in the order of `samples`."""
    ids = {id(sample) for sample in away}
    return (
        [sample for sample in samples if id(sample) not in ids],
        [sample for sample in samples if id(sample) in ids],
    )


def load_heldout(folder: Path, data: DataConfig) -> SampleSet:
    """Images that are not trained on, with their captions where the training images have theirs.

    Raises ConfigError as `load_samples` does.
    """
    is_alike = data.instance_data_dir is not None and (folder / METADATA).is_file()
    return load_samples(folder, data.instance_prompt, data.caption_column if is_alike else None)


def check_unseen(heldout: Sequence[Sample], training: Sequence[Sample], tense: Literal["are", "were"]) -> None:
    """Raise ConfigError for images of `heldout_dir` that `are` or `were` trained on."""
    seen = {sample.sha256 for sample in training}
    both = [sample.id for sample in heldout if sample.sha256 in seen]
    if both:
        raise ConfigError(f"heldout_dir has images that {tense} trained on: {', '.join(both[:5])}; take them out")


def _caption(row: Any, data: DataConfig) -> str:
    """The row's own caption on one line; empty if it has none."""
    caption = row[data.caption_column] if data.caption_column else ""
    if not isinstance(caption, str | None):
        raise ConfigError(f"caption_column={data.caption_column!r} must hold texts, but a row has {caption!r}")
    return " ".join((caption or "").split())


def _train_split(data: DataConfig) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("--dataset_name needs the package `datasets`: pip install datasets")
    import datasets

    try:
        loaded = datasets.load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=data.cache_dir)
    except Exception as error:  # a hub, a disk, a parser: whatever went wrong, the user named the dataset
        why = loading_failure(str(data.dataset_name), error, "load it once")
        raise ConfigError(f"dataset_name={data.dataset_name!r} cannot be loaded: {why}") from error
    if "train" not in loaded:
        raise ConfigError(f"dataset_name={data.dataset_name!r} has no split `train`, only {', '.join(loaded)}")
    split = loaded["train"]
    for setting, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
        if column is not None and column not in split.column_names:
            known = ", ".join(split.column_names)
            raise ConfigError(f"{setting}={column!r} is not a column of the dataset, which has: {known}")
    return split.cast_column(data.image_column, datasets.Image(decode=False))
