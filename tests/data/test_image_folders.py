"""Output folders are separate from image folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.data.sources import check_folders_apart, image_folders

PRIOR = {"with_prior_preservation": True, "class_prompt": "an icon"}


def config_in(root: Path, **settings: Any) -> TrainConfig:
    """Settings with paths below `root`."""
    places = {
        name: str(root / value) if name.endswith(("_dir", "_name")) else value for name, value in settings.items()
    }
    return TrainConfig.from_dict({"output_dir": str(root / "runs" / "one"), **places})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "icons").mkdir()
    (tmp_path / "all" / "icons").mkdir(parents=True)
    return tmp_path


def test_image_folders_are_listed_by_setting(root: Path) -> None:
    config = config_in(root, instance_data_dir="icons", validation_data_dir="others", class_data_dir="class")
    assert image_folders(config) == {"instance_data_dir": [root / "icons"], "validation_data_dir": [root / "others"]}
    assert image_folders(config.replace(**PRIOR))["class_data_dir"] == [root / "class"]
    assert image_folders(config_in(root, dataset_name="icons")) == {"dataset_name": [root / "icons"]}
    assert image_folders(TrainConfig.from_dict({"dataset_name": "someone/icons"})) == {}


def test_the_folders_of_a_dataset_file_are_listed(root: Path) -> None:
    file = root / "dataset.toml"
    file.write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "icons"\n[[datasets.subsets]]\nimage_dir = "more"\n'
    )
    config = config_in(root).replace(dataset_config=str(file), output_dir=str(root / "more"))
    (folders,) = image_folders(config).values()
    assert [folder.name for folder in folders] == ["icons", "more"]


@pytest.mark.parametrize("setting", ["instance_data_dir", "validation_data_dir", "class_data_dir", "dataset_name"])
@pytest.mark.parametrize("output", ["icons", "icons/run", "."])
def test_a_run_folder_that_overlaps_an_image_folder_is_an_error(root: Path, setting: str, output: str) -> None:
    prior = PRIOR if setting == "class_data_dir" else {}
    check_folders_apart(config_in(root, **{setting: "icons"}, **prior))
    with pytest.raises(ConfigError, match=rf"output_dir=.*{setting}=.*icons"):
        check_folders_apart(config_in(root, **{setting: "icons"}, **prior, output_dir=output))


@pytest.mark.parametrize(
    ("setting", "folder", "images", "is_refused"),
    [
        ("class_data_dir", "all/icons", "instance_data_dir", True),
        ("class_data_dir", "all/icons", "validation_data_dir", True),
        ("class_data_dir", "all/icons", "dataset_name", True),
        ("class_data_dir", "all/icons/class", "dataset_name", True),
        ("class_data_dir", "all/icons/class", "instance_data_dir", False),
        ("class_data_dir", "all", "instance_data_dir", False),
        ("embedding_cache_dir", "all/icons", "instance_data_dir", True),
        ("embedding_cache_dir", "all/icons/cache", "instance_data_dir", False),
        ("embedding_cache_dir", "runs/one/cache", "instance_data_dir", False),
    ],
)
def test_class_images_and_caches_are_not_written_among_the_training_images(
    root: Path, setting: str, folder: str, images: str, is_refused: bool
) -> None:
    prior = PRIOR if setting == "class_data_dir" else {}
    config = config_in(root, **{setting: folder, images: "all/icons"}, **prior)
    if not is_refused:
        check_folders_apart(config)
        return
    with pytest.raises(ConfigError, match=rf"{setting}=.*{images}="):
        check_folders_apart(config)


def test_a_class_folder_without_prior_preservation_may_be_anywhere(root: Path) -> None:
    check_folders_apart(config_in(root, instance_data_dir="icons", class_data_dir="icons"))
