"""Held-out images choose the checkpoint that becomes the result, and end a run that stops improving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import samples_of

from flatlora_diffusion.config import ConfigError, StoppedError, TrainConfig
from flatlora_diffusion.data.sources import hold_out, load_training_set
from flatlora_diffusion.evaluation.finished_runs import check_images, read_runs
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training import holdout as holdout
from flatlora_diffusion.training.checkpoint import best_step
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train


@pytest.fixture
def watched(config: TrainConfig) -> TrainConfig:
    return config.replace(holdout_images=1, checkpointing_steps=1, max_train_steps=4, checkpoints_total_limit=1)


def set_losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Replace the measured held-out losses, in order."""
    left = iter(losses)
    monkeypatch.setattr(holdout.HeldoutLoss, "now", lambda _: next(left))


def steps_of(run: RunDir, event: str) -> list[int]:
    return [entry["step"] for entry in run.events() if entry["event"] == event]


def test_the_result_is_the_checkpoint_with_the_lowest_loss(
    watched: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_losses(monkeypatch, 0.5, 0.3, 0.4, 0.35)
    path = train(watched.replace(validation_prompt="an icon", num_validation_images=1))
    run = RunDir(path.parent)
    assert steps_of(run, "finished") == steps_of(run, "chosen") == [2]
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2", "checkpoint-4"], (
        "the best goes over the limit"
    )
    best, last = load_file(run.folder / "checkpoint-2" / LORA_FILE), load_file(run.folder / "checkpoint-4" / LORA_FILE)
    result = load_file(path)
    assert all(torch.equal(value, best[name]) for name, value in result.items())
    assert not all(torch.equal(value, last[name]) for name, value in result.items())
    assert (run.images / "step-2-0.png").is_file()


def test_a_run_ends_when_the_loss_stops_falling(watched: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    set_losses(monkeypatch, 0.3, 0.31, 0.32)
    run = RunDir(train(watched.replace(holdout_patience=2, max_train_steps=9)).parent)
    assert len(steps_of(run, "step")) == 3
    assert steps_of(run, "finished") == [1]


def test_the_loss_is_that_of_the_images_that_are_not_trained_on(watched: TrainConfig) -> None:
    watched = watched.replace(max_train_steps=1, use_ema=True)
    run = RunDir(train(watched).parent)
    ours, theirs = hold_out(samples_of(watched), 1)
    rows = run.manifest()
    assert [row["id"] for row in rows if "is_held_out" not in row] == [sample.id for sample in ours]
    assert [row["id"] for row in rows if row.get("is_held_out")] == [sample.id for sample in theirs]
    state = prepare(watched, ours)
    probe = fixed_probe(state.base, theirs, 32, seed=0)
    before = probe_loss(state.base.denoiser, state.base.objective(), probe)
    (loss,) = run.holdout_losses().values()
    assert loss == pytest.approx(before, rel=0.05)
    assert loss != before


def test_a_resumed_run_chooses_as_the_unbroken_one(watched: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    set_losses(monkeypatch, 0.5, 0.3, 0.2, 0.4, 0.45)
    watched = watched.replace(checkpoints_total_limit=None)
    run = RunDir(train(watched.replace(max_train_steps=3)).parent)
    assert steps_of(run, "finished") == [3]
    again = {"resume_from_checkpoint": "checkpoint-2", "max_train_steps": 4}
    train(watched.replace(**again))
    assert run.holdout_losses() == {1: 0.5, 2: 0.3, 3: 0.4, 4: 0.45}, "step 3 was trained anew"
    assert steps_of(run, "finished") == [3, 2]


def test_a_checkpoint_left_unmeasured_by_a_stop_is_measured_on_resume(
    watched: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, run = watched.replace(max_train_steps=3), RunDir(Path(watched.run.output_dir))
    left = iter((0.5, 0.2, 0.4))

    def now(_: object) -> float:
        if not run.checkpoints():
            run.stop_file.touch()  # in the first step, so that the second one ends the run
        return next(left)

    monkeypatch.setattr(holdout.HeldoutLoss, "now", now)
    with pytest.raises(StoppedError, match="stopped after step 2"):
        train(watched)
    assert run.holdout_losses() == {1: 0.5}, "a stop has to be quick"
    train(watched.replace(resume_from_checkpoint="latest"))
    assert run.holdout_losses() == {1: 0.5, 2: 0.2, 3: 0.4}
    assert steps_of(run, "finished") == [2]


def test_the_same_images_are_held_out_in_any_order_and_something_is_left_to_train(config: TrainConfig) -> None:
    samples = samples_of(config)
    left, away = hold_out(samples, 1)
    assert {sample.id for sample in hold_out(samples[::-1], 1)[1]} == {sample.id for sample in away}
    assert sorted(sample.id for sample in [*left, *away]) == [sample.id for sample in samples]
    assert hold_out(samples, 0) == (samples, [])
    with pytest.raises(ConfigError, match="holdout_images=3 leaves none of the 3 images to train on"):
        train(config.replace(holdout_images=3))
    with pytest.raises(ConfigError, match=r"--holdout_patience.*--holdout_images"):
        config.replace(holdout_patience=2)


def test_the_first_of_equal_losses_is_the_best() -> None:
    assert best_step({4: 0.2, 2: 0.2, 6: 0.3}) == 2


def test_a_comparison_follows_a_run_to_its_chosen_checkpoint(
    watched: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatlora_diffusion.compare.arms import Arm, PlannedRun

    set_losses(monkeypatch, 0.5, 0.3, 0.4, 0.35)
    watched = watched.replace(checkpoints_total_limit=None)
    path = train(watched)
    planned = PlannedRun(Arm("flat-lora", "Flat-LoRA", "arm", "flat-lora"), 3, watched)
    assert planned.is_finished
    check_images(read_runs([str(path.parent)])[0], load_training_set(watched.data))
    assert list(planned.files.items()) == [(1, path.parent / "checkpoint-1" / LORA_FILE), (2, Path(path))]
