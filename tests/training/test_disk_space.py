"""A run that does not fit on its disk is refused before it starts; the disks are real and small."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from small_disk import small_disk

from flatlora_diffusion.config import ConfigError, RunError, TrainConfig
from flatlora_diffusion.data import class_images
from flatlora_diffusion.memory.disk import class_images_need, disk_need
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training import trainer
from flatlora_diffusion.training.trainer import train

LOGS = 64 * 1024  # bytes of a short run's log, card and settings, which the check ignores


@pytest.fixture
def big(config: TrainConfig) -> TrainConfig:
    """A run whose checkpoint and result are larger than all its other files."""
    return config.replace(rank=64, checkpointing_steps=2)


def needed(config: TrainConfig) -> int:
    """KiB of a checkpoint and the result."""
    need = disk_need(config)
    return (need.checkpoint + need.result) // 1024


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_run_begins_only_with_room_for_a_checkpoint_and_the_result(
    big: TrainConfig, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_training_set", lambda _: pytest.fail("it went on"))
    with small_disk(tmp_path / "disk", int(share * needed(big))) as disk:
        config = big.replace(output_dir=str(disk / "run"))
        with pytest.raises(ConfigError, match=r"output_dir=.*disk.run.* free, .*checkpoint.* result") as refused:
            train(config)
        assert "\n" not in str(refused.value)
        assert list(disk.iterdir()) == []


def test_a_run_with_that_disk_space_finishes(big: TrainConfig, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", needed(big) + LOGS // 1024) as disk:
        run = RunDir(disk / "run")
        train(big.replace(output_dir=str(run.folder)))
        assert [path.name for path in run.checkpoints()] == ["checkpoint-2"]
        assert (run.folder / LORA_FILE).is_file()


def test_an_earlier_run_is_not_moved_if_the_disk_is_too_full(big: TrainConfig, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", int(1.5 * needed(big))) as disk:
        folder = disk / "run"
        config = big.replace(output_dir=str(folder))
        train(config)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(ConfigError, match="output_dir="):
            train(config)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_resumed_run_is_checked_too(big: TrainConfig, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", int(1.5 * needed(big))) as disk:
        config = big.replace(output_dir=str(disk / "run"))
        train(config)
        with pytest.raises(ConfigError, match="output_dir="):
            train(config.replace(max_train_steps=9, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("is_one_disk", [False, True])
def test_class_images_are_generated_only_with_enough_disk_space(
    big: TrainConfig, tmp_path: Path, is_one_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's disk needs room for both."""
    monkeypatch.setattr(class_images, "_generate", lambda *_: pytest.fail("it was begun"))
    prior: dict[str, Any] = {"with_prior_preservation": True, "class_prompt": "an icon", "resolution": 32}
    config = big.replace(**prior, num_class_images=400, class_data_dir="x")
    images = class_images_need(config) // 1024
    room = (needed(config) + images // 2) if is_one_disk else images // 2
    with small_disk(tmp_path / "disk", room) as disk:
        changes = {"output_dir": str(disk / "run")} if is_one_disk else {}
        with pytest.raises(ConfigError, match="class images") as refused:
            train(config.replace(class_data_dir=str(disk / "class"), **changes))
        assert ("output_dir=" if is_one_disk else "class_data_dir=") in str(refused.value)


def test_needed_and_free_space_are_logged_in_one_line(
    big: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flatlora_diffusion.training.disk_space")
    with small_disk(tmp_path / "disk", 3 * needed(big)) as disk:
        train(big.replace(output_dir=str(disk / "run")))
    assert [record.levelname for record in caplog.records if record.name.endswith(".disk_space")] == ["INFO"]


def test_checkpoints_that_do_not_fit_are_warned_of(
    big: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"max_train_steps": 8, "checkpointing_steps": 2, "output_dir": str(tmp_path / "disk" / "run")}
    with small_disk(tmp_path / "disk", 3 * needed(big)):
        with pytest.raises(RunError, match="space"):
            train(big.replace(**few))
        (message,) = (record.getMessage() for record in caplog.records if record.name.endswith(".disk_space"))
        assert "3 of the 4 checkpoints" in message
        assert "--checkpoints_total_limit" in message
    caplog.clear()
    with small_disk(tmp_path / "disk", 3 * needed(big)):
        train(big.replace(**few, checkpoints_total_limit=2))
        assert not [record for record in caplog.records if record.name.endswith(".disk_space")]


def test_a_base_whose_size_is_unknown_is_trained_all_the_same(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: TrainConfig) -> None:
        raise KeyError("sample_size")

    monkeypatch.setattr("flatlora_diffusion.training.disk_space.disk_need", fail)
    train(config)
    assert "could not be estimated" in caplog.text
