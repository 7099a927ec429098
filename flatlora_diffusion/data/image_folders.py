"""The image folders that a run reads, and the check that no output goes into them."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset_file import read_dataset_file
from flatlora_diffusion.storage.separate_folders import Relation, check_separate

_CLASS = "class_data_dir"


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
