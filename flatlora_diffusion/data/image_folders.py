"""Where the images lie that a run reads, and that nothing is written among them."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset_file import read_dataset_file
from flatlora_diffusion.storage.separate_folders import Relation, check_separate

_CLASS = "class_data_dir"


def image_folders(config: TrainConfig) -> dict[str, list[Path]]:
    """The folders of images that a run reads, by the setting that names them. A dataset on the hub has none.

    Raises ConfigError for a dataset file that cannot be used.
    """
    data = config.data
    is_local = data.dataset_name is not None and Path(data.dataset_name).is_dir()
    named = {
        "instance_data_dir": data.instance_data_dir,
        "dataset_name": data.dataset_name if is_local else None,
        "validation_data_dir": config.run.validation_data_dir,
        _CLASS: data.class_data_dir if data.with_prior_preservation else None,
    }
    folders = {name: [Path(folder)] for name, folder in named.items() if folder is not None}
    if data.dataset_config is not None:
        folders["dataset_config"] = [subset.folder for subset in read_dataset_file(Path(data.dataset_config))[0]]
    return folders


def check_folders_apart(config: TrainConfig) -> None:
    """Raises ConfigError for a folder that a run would fill among images that are read.

    Its own may neither be, nor lie in, nor hold a folder of images. Class images and what is cached may lie inside or
    around, where no image is looked for, but not inside of a local dataset, which is read with all that is below it.
    """
    folders = image_folders(config)
    filled = {"embedding_cache_dir": config.data.embedding_cache_dir}
    if _CLASS in folders:
        filled[_CLASS] = config.data.class_data_dir
    for name, images in folders.items():
        check_separate("output_dir", Path(config.run.output_dir), name, images)
        refused: tuple[Relation, ...] = ("is", "lies in") if name == "dataset_name" else ("is",)
        for setting, folder in filled.items():
            if folder is not None and setting != name:
                check_separate(setting, Path(folder), name, images, refused)
