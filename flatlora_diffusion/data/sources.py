"""The training set: a folder, the folders of a dataset file, or a Hugging Face dataset; its splits and its folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from flatlora_diffusion.config import ConfigError, DataConfig, TrainConfig
from flatlora_diffusion.data.dataset import METADATA, Sample, SampleSet, check_samples, load_samples, make_sample
from flatlora_diffusion.data.dataset_file import load_dataset_file, read_dataset_file
from flatlora_diffusion.data.images import ImageError
from flatlora_diffusion.storage.hub_errors import loading_failure
from flatlora_diffusion.storage.separate_folders import Relation, check_separate

_CLASS = "class_data_dir"


def load_training_set(data: DataConfig) -> SampleSet:
    """Load the images and captions that `data` names. Raises ConfigError if there are no usable ones."""
    if data.dataset_name is not None:
        return load_hf_dataset(data)
    if data.dataset_config is not None:
        return load_dataset_file(Path(data.dataset_config), data.instance_prompt)
    if data.instance_data_dir is None:
        raise ConfigError("--instance_data_dir is missing: give the folder with the training images")
    return load_samples(Path(data.instance_data_dir), data.instance_prompt, data.caption_column)


def check_training_set(data: DataConfig) -> None:
    """Raise ConfigError for folders that `load_training_set` would refuse, usually without decoding images.

    A Hugging Face dataset is not checked.
    """
    if data.dataset_config is not None:
        for subset in read_dataset_file(Path(data.dataset_config))[0]:
            check_samples(subset.folder, subset.prompt or data.instance_prompt)
    elif data.instance_data_dir is not None:
        check_samples(Path(data.instance_data_dir), data.instance_prompt, data.caption_column)


def load_hf_dataset(data: DataConfig) -> SampleSet:
    """Load the images of the `train` split of `data.dataset_name`, in the dataset's order.

    The caption of a row is its `caption_column`, or the instance prompt if that is empty. Raises ConfigError if the
    dataset, its columns or its images cannot be used, or if the package `datasets` is missing.
    """
    rows = _train_split(data)
    samples, skipped, uncaptioned = [], [], 0
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
            uncaptioned += not caption
        except (ImageError, OSError) as error:
            skipped.append((name, str(error)))
    if not samples:
        raise ConfigError(f"dataset_name={data.dataset_name!r} has no readable image in column {data.image_column!r}")
    if uncaptioned and not (data.instance_prompt and data.instance_prompt.strip()):
        count = f"{uncaptioned} of {len(samples)}" if data.caption_column else "its"
        raise ConfigError(
            f"dataset_name={data.dataset_name!r}: {count} images have no caption; give --caption_column or an "
            "--instance_prompt"
        )
    return SampleSet(samples, captioned=len(samples) - uncaptioned, skipped=skipped)


def hold_out(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Split samples into training images and `count` held-out images, both in their order.

    The held-out images are chosen by their hashes: all seeds and arms of a comparison hold out the same ones. Raises
    ConfigError if no training image remains.
    """
    if count and count >= len(samples):
        raise ConfigError(
            f"holdout_images={count} leaves none of the {len(samples)} images to train on; give a lower number"
        )
    chosen = sorted(samples, key=lambda sample: (sample.sha256, sample.id))[:count]
    ids = {id(sample) for sample in chosen}
    return (
        [sample for sample in samples if id(sample) not in ids],
        [sample for sample in samples if id(sample) in ids],
    )


def load_heldout(folder: Path, data: DataConfig) -> SampleSet:
    """Load held-out images, with captions as in the training images. Raises ConfigError as `load_samples` does."""
    has_column = data.instance_data_dir is not None and (folder / METADATA).is_file()
    return load_samples(folder, data.instance_prompt, data.caption_column if has_column else None)


def check_not_trained_on(heldout: Sequence[Sample], training: Sequence[Sample], tense: Literal["are", "were"]) -> None:
    """Raise ConfigError for held-out images that are also training images."""
    training_hashes = {sample.sha256 for sample in training}
    names = [sample.id for sample in heldout if sample.sha256 in training_hashes]
    if names:
        raise ConfigError(f"heldout_dir has images that {tense} trained on: {', '.join(names[:5])}; remove them")


def _caption(row: Any, data: DataConfig) -> str:
    """Return the row's caption on one line; empty without one."""
    caption = row[data.caption_column] if data.caption_column else ""
    if not isinstance(caption, str | None):
        raise ConfigError(f"caption_column={data.caption_column!r} must contain texts, but a row has {caption!r}")
    return " ".join((caption or "").split())


def _train_split(data: DataConfig) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("--dataset_name needs the package `datasets`: pip install datasets")
    import datasets

    try:
        loaded = datasets.load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=data.cache_dir)
    except Exception as error:  # of the hub, the disk or a parser
        why = loading_failure(str(data.dataset_name), error, "load it once")
        raise ConfigError(f"dataset_name={data.dataset_name!r} cannot be loaded: {why}") from error
    if "train" not in loaded:
        raise ConfigError(f"dataset_name={data.dataset_name!r} has no split `train`, only {', '.join(loaded)}")
    split = loaded["train"]
    for setting, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
        if column is not None and column not in split.column_names:
            names = ", ".join(split.column_names)
            raise ConfigError(f"{setting}={column!r} is not a column of the dataset, which has: {names}")
    return split.cast_column(data.image_column, datasets.Image(decode=False))


def image_folders(config: TrainConfig) -> dict[str, list[Path]]:
    """Return the image folders that a run reads, by setting; none for a dataset on the hub.

    Raises ConfigError for an invalid dataset file.
    """
    data = config.data
    is_local = data.dataset_name is not None and Path(data.dataset_name).is_dir()
    settings = {
        "instance_data_dir": data.instance_data_dir,
        "dataset_name": data.dataset_name if is_local else None,
        "validation_data_dir": config.run.validation_data_dir,
        _CLASS: data.class_data_dir if data.with_prior_preservation else None,
    }
    folders = {name: [Path(folder)] for name, folder in settings.items() if folder is not None}
    if data.dataset_config is not None:
        folders["dataset_config"] = [subset.folder for subset in read_dataset_file(Path(data.dataset_config))[0]]
    return folders


def check_folders_apart(config: TrainConfig) -> None:
    """Raise ConfigError for an output folder that overlaps with an image folder.

    output_dir may not contain images or be inside an image folder. Class images and caches may, because images are
    read from the top of a folder only, but not inside a local dataset, which is read recursively.
    """
    folders = image_folders(config)
    outputs = {"embedding_cache_dir": config.data.embedding_cache_dir}
    if _CLASS in folders:
        outputs[_CLASS] = config.data.class_data_dir
    for name, images in folders.items():
        check_separate("output_dir", Path(config.run.output_dir), name, images)
        refused: tuple[Relation, ...] = ("is", "lies in") if name == "dataset_name" else ("is",)
        for setting, folder in outputs.items():
            if folder is not None and setting != name:
                check_separate(setting, Path(folder), name, images, refused)
