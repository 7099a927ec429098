"""Folds choose the number of steps for few images: each image is held out once, then the run trains on all."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tiny_runs import samples_of

from flatlora_diffusion.compare.arms import PlannedRun, parse_arm
from flatlora_diffusion.config import ConfigError, StoppedError, TrainConfig
from flatlora_diffusion.data import dataset
from flatlora_diffusion.data.dataset import SampleSet, make_sample, manifest
from flatlora_diffusion.data.sources import Fold, split_fold
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training import holdout as holdout
from flatlora_diffusion.training.holdout_folds import choose_steps_by_folds, mean_losses
from flatlora_diffusion.training.trainer import train


@pytest.fixture
def folded(config: TrainConfig) -> TrainConfig:
    return config.replace(holdout_folds=2, max_train_steps=3, checkpointing_steps=1, sigma_schedule="cosine")


def set_losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Replace the measured held-out losses, in order."""
    left = iter(losses)
    monkeypatch.setattr(holdout.HeldoutLoss, "now", lambda _: next(left))


def steps_of(run: RunDir, event: str) -> list[int]:
    return [entry["step"] for entry in run.events() if entry["event"] == event]


def test_the_run_trains_on_all_images_for_the_steps_chosen_by_the_folds(
    folded: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Its result equals the checkpoint of a run with all steps, bit for bit."""
    run = RunDir(Path(folded.run.output_dir))
    ended = Mock()  # the process group, which all folds need
    monkeypatch.setattr(PartialState, "destroy_process_group", ended)
    reading = Mock(wraps=make_sample)
    monkeypatch.setattr(dataset, "make_sample", reading)
    set_losses(monkeypatch, 0.5, 0.4, 0.5, 0.5, 0.4, 0.3)  # of 2 images and of 1: the means are 0.5, 0.4, 0.43
    with caplog.at_level(logging.INFO):
        path = train(folded)
    assert reading.call_count == 3, "folds and run read each image once"
    ended.assert_not_called()
    assert steps_of(run, "finished") == [2]
    assert len(steps_of(run, "step")) == 2
    ids = {sample.id for sample in samples_of(folded)}
    assert {row["id"] for row in run.manifest() if not row.get("is_held_out")} == ids, "all images are trained on"
    away = [{row["id"] for row in run.fold(number).manifest() if row.get("is_held_out")} for number in (1, 2)]
    assert sorted(name for ids_of_fold in away for name in ids_of_fold) == sorted(ids), (
        "each image is held out by one fold"
    )
    assert all(steps_of(run.fold(number), "holdout") == [1, 2, 3] for number in (1, 2))
    assert "fold 2 of 2: trains on 2 images, 1 are held out" in caplog.text
    assert "1: 0.5000, 2: 0.4000, 3: 0.4333" in caplog.text
    assert "the run on all images takes 2 steps" in caplog.messages
    planned = PlannedRun(parse_arm("flat-lora:holdout_folds=2"), 3, folded)
    assert (planned.is_finished, planned.last_step, list(planned.files)) == (True, 2, [1, 2]), "an arm of a comparison"
    other = train(folded.replace(holdout_folds=0, output_dir=str(tmp_path / "other")))
    expected, result = load_file(other.parent / "checkpoint-2" / LORA_FILE), load_file(path)
    assert all(torch.equal(value, expected[name]) for name, value in result.items())


def test_trained_folds_are_reused(
    folded: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop file in the run's folder stops the fold at work; the same command goes on, with the drawn seed."""
    folded = folded.replace(seed=None)
    run = RunDir(Path(folded.run.output_dir))
    losses = iter((0.5, 0.4, 0.45, 0.3, 0.2, 0.6))

    def now(_: object) -> float:
        loss = next(losses)
        if loss == 0.3:  # the first measurement of the second fold
            run.stop_file.touch()
        return loss

    monkeypatch.setattr(holdout.HeldoutLoss, "now", now)
    with pytest.raises(StoppedError, match="fold 2 of 2: stopped after step 2 by the stop file; the same command"):
        train(folded)
    before = run.fold(1).events()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(folded)
    assert run.fold(1).events() == before
    assert run.fold(2).holdout_losses() == {1: 0.3, 2: 0.2, 3: 0.6}, "the step of the stop is measured later"
    assert "fold 1 of 2: already trained in" in caplog.text
    assert steps_of(run.fold(2), "resumed") == [2]
    assert steps_of(run, "finished") == [2]
    assert run.config()["seed"] == run.fold(1).config()["seed"]


def test_other_images_or_settings_train_the_folds_again(folded: TrainConfig, icons: Path, tmp_path: Path) -> None:
    trained = []

    def train_fold(config: TrainConfig, run: RunDir, images: SampleSet, fold: Fold) -> Path:
        training, heldout = split_fold(images.samples, *fold)
        away = [{**row, "is_held_out": True} for row in manifest(heldout)]
        run.start(config.to_dict(), [*manifest(training), {"id": "a class image", "sha256": "0"}, *away])
        for step in (1, 2, 3):
            run.add_event({"event": "holdout", "step": step, "loss": abs(step - 1.9)})
        trained.append(fold.number)
        return run.folder

    def chosen(config: TrainConfig) -> int:
        run = RunDir(Path(config.run.output_dir))
        run.folder.mkdir(exist_ok=True)
        trained.clear()
        return choose_steps_by_folds(config, run, train_fold)[2]

    assert (chosen(folded), trained) == (2, [1, 2])
    assert (chosen(folded), trained) == (2, [])
    assert (chosen(folded.replace(rank=2)), trained) == (2, [1, 2])
    shutil.copytree(icons, tmp_path / "icons")
    folded = folded.replace(rank=2, instance_data_dir=str(tmp_path / "icons"))
    assert (chosen(folded), trained) == (2, []), "the same images in another folder"
    next((tmp_path / "icons").glob("*.txt")).write_text("another caption", encoding="utf-8")
    assert (chosen(folded), trained) == (2, [1, 2])


def test_the_loss_of_an_image_counts_once_and_only_steps_of_all_folds_are_compared() -> None:
    assert mean_losses([{1: 0.1, 2: 0.4}, {1: 0.4, 3: 0.1}], [2, 1]) == pytest.approx({1: 0.2})


def test_folds_are_the_same_in_any_order_and_nearly_as_large(config: TrainConfig) -> None:
    samples = samples_of(config)
    for number in (1, 2):
        training, heldout = split_fold(samples, number, 2)
        assert {sample.id for sample in split_fold(samples[::-1], number, 2)[1]} == {sample.id for sample in heldout}
        assert len(heldout) == 3 - number
        assert sorted(sample.id for sample in (*training, *heldout)) == sorted(sample.id for sample in samples)
    twins = [*samples, *(replace(sample, id=f"copy of {sample.id}") for sample in samples)]
    training, heldout = split_fold(twins, 2, 3)
    assert len(heldout) == 2
    assert not {sample.sha256 for sample in training} & {sample.sha256 for sample in heldout}, (
        "a copy would tell what is held out"
    )
    with pytest.raises(ConfigError, match="holdout_folds=4 is more than the 3 images"):
        split_fold(twins, 1, 4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"holdout_folds": 1}, "--holdout_folds 1 "),
        ({"holdout_images": 1}, "--holdout_folds.*--holdout_images"),
        ({"max_train_steps": None}, "--holdout_folds needs --max_train_steps"),
        ({"checkpointing_steps": 3}, "checkpointing_steps=3 .*3 steps"),
    ],
)
def test_settings_incompatible_with_folds_are_refused(
    folded: TrainConfig, changes: dict[str, int | None], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        folded.replace(**changes)
