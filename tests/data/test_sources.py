"""Hugging Face datasets: captions, columns and held-out images."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.sources import load_heldout, load_training_set
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.trainer import train


def test_a_hugging_face_dataset_is_trained_on(config: TrainConfig, icons: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "imagefolder"
    shutil.copytree(icons, folder)
    lines = [f'{{"file_name": "icon-{i}.png", "text": "caption {i}"}}\n' for i in range(3)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    for extra in folder.glob("*.txt"):
        extra.unlink()
    named = config.replace(
        instance_data_dir=None, dataset_name=str(folder), caption_column="text", cache_dir=str(tmp_path / "hf")
    )
    train(named)
    manifest = RunDir(Path(named.run.output_dir)).manifest()
    by_file = {sample.sha256 for sample in load_samples(icons).samples}
    assert {entry["sha256"] for entry in manifest} == by_file
    for changes, message in (
        ({"caption_column": "words"}, "caption_column='words' is not a column"),
        ({"image_column": "picture"}, "image_column='picture' is not a column"),
        ({"caption_column": None}, "give --caption_column or an --instance_prompt"),
        ({"dataset_name": str(tmp_path / "nothing")}, "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(named.replace(**changes))


def test_a_dataset_is_loaded_with_its_configuration_name(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*named: Any, **more: Any) -> Any:
        asked.append((named, more))
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    named = config.replace(
        instance_data_dir=None, dataset_name="a/b", dataset_config_name="flat", caption_column="text", cache_dir="hf"
    )
    with pytest.raises(ConfigError, match="dataset_name='a/b' cannot be loaded: no network"):
        load_training_set(named.data)
    assert asked == [(("a/b", "flat"), {"cache_dir": "hf"})]


def test_dataset_rows_without_caption_or_image_count_as_missing(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "imagefolder"
    folder.mkdir()
    captions = ["first", " ", None, "never", "never"]
    for index in range(3):
        shutil.copy(icons / f"icon-{index}.png", folder)
    for index in (3, 4):
        (folder / f"icon-{index}.png").write_bytes(b"no image")
    rows = [{"file_name": f"icon-{index}.png", "text": caption} for index, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = config.replace(
        instance_data_dir=None,
        dataset_name=str(folder),
        caption_column="text",
        instance_prompt="a prompt",
        cache_dir=str(tmp_path / "hf"),
    ).data
    result = load_training_set(data)
    assert [sample.caption for sample in result.samples] == ["first", "a prompt", "a prompt"]
    assert result.summary.startswith("3 images, captions 1/3, ")
    for prompt in (None, " "):
        with pytest.raises(ConfigError, match="2 of 3 images have no caption; give"):
            load_training_set(replace(data, instance_prompt=prompt))
    numbers = [{"file_name": f"icon-{index}.png", "text": index} for index in range(5)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"caption_column='text' .* 0"):
        load_training_set(data)


def test_heldout_images_use_the_caption_column_if_they_have_it(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("training", "heldout", "sidecars")]
    for folder in folders:
        shutil.copytree(icons, folder)
    for folder in folders[:2]:
        rows = [{"file_name": f"icon-{index}.png", "text": "x", "mine": f"my {index}"} for index in range(3)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = config.replace(instance_data_dir=str(folders[0]), caption_column="mine")
    for folder, caption in ((folders[1], "my 0"), (folders[2], "an icon of thing 0")):
        result = load_heldout(folder, chosen.data)
        assert result.samples[0].caption == caption
