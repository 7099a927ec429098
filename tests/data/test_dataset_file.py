"""Dataset files of sd-scripts: folders, repeats, prompts, ignored settings and error messages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.dataset_file import load_dataset_file
from flatlora_diffusion.data.schedule import build_schedule
from flatlora_diffusion.data.sources import load_training_set
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.trainer import train

FILE = """
[general]
shuffle_caption = true
caption_extension = ".txt"
num_repeats = 2

[[datasets]]
resolution = 1024
batch_size = 4
  [[datasets.subsets]]
  image_dir = "one/icons"
  class_tokens = "an icon of a folder"
  caption_prefix = "TOK,"
  num_repeats = 3
  [[datasets.subsets]]
  image_dir = "two/icons"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name, colour in (("one", "red"), ("two", "blue")):
        folder = tmp_path / name / "icons"
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(folder / "a.png")
    (tmp_path / "two" / "icons" / "a.txt").write_text("a blue square")
    path = tmp_path / "data.toml"
    path.write_text(FILE)
    return path


def test_each_folder_has_its_own_repeats_and_prompt(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        result = load_dataset_file(file, None)
    assert [(one.id, one.caption, one.repeats) for one in result.samples] == [
        ("1-icons/a.png", "TOK, an icon of a folder", 3),
        ("2-icons/a.png", "a blue square", 2),
    ]
    assert result.captioned == 1
    assert "shuffle_caption = True (--shuffle_tags), resolution = 1024 (--resolution)" in caplog.text


@pytest.mark.parametrize("buckets", [False, True])
def test_an_epoch_has_each_image_as_often_as_its_folder_s_repeats(file: Path, buckets: bool) -> None:
    samples = load_dataset_file(file, None).samples
    config = TrainConfig().replace(seed=0, resolution=32, train_batch_size=1, use_aspect_ratio_buckets=buckets)
    schedule = build_schedule(config, samples, 16)
    assert schedule.steps_per_epoch == 5
    drawn = [draw for index in range(10) for draw in schedule.batch(index)]
    assert Counter(draw.sample for draw in drawn) == {0: 6, 1: 4}
    assert len(set(drawn)) == 10, "each showing has a crop of its own"


def test_without_repeats_the_batches_are_those_of_the_plain_order(file: Path) -> None:
    from dataclasses import replace

    samples: list[Sample] = [replace(one, repeats=1) for one in load_dataset_file(file, None).samples]
    schedule = build_schedule(TrainConfig().replace(seed=0, resolution=32, train_batch_size=2), samples, 16)
    assert [schedule.batch(index) for index in range(4)] == [schedule.order.batch(index) for index in range(4)]


def test_a_run_trains_on_all_folders(config: TrainConfig, file: Path) -> None:
    path = train(config.replace(instance_data_dir=None, dataset_config=str(file), max_train_steps=1))
    rows = RunDir(path.parent).manifest()
    assert [(row["id"], row["repeats"]) for row in rows] == [("1-icons/a.png", 3), ("2-icons/a.png", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml", "is not a TOML file"),
        ("[[datasets]]", r"lists no folder; add \[\[datasets.subsets\]\] with image_dir"),
        ("[[datasets]]\n[[datasets.subsets]]", "subset 1 of dataset 1 has no image_dir"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\nis_reg=true", "give --with_prior_preservation"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\nnum_repeats='2'",
            "num_repeats='2' must be a whole number",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\nnum_repeats=true",
            "num_repeats=True must be a whole number",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\nnum_repeats=0", "must be between 1 and 10000"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\ncaption_extension='.cap'",
            "caption_extension=.*.txt or .caption",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'\nmetadata_file='m.json'", "in a metadata_file: write"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='x'", "image folder x does not exist"),
        ("datasets = 3", "datasets must be a list of tables"),
        ("[dataset]\nx=1", "has dataset; only"),
    ],
)
def test_an_error_in_a_dataset_file_names_its_location(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_dataset_file(tmp_path / "data.toml", "an icon")


def test_two_sources_of_images_or_a_missing_dataset_file_are_an_error(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--instance_data_dir.*--dataset_config"):
        config.replace(dataset_config="data.toml")
    gone: Any = config.replace(instance_data_dir=None, dataset_config=str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_training_set(gone.data)
