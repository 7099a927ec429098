"""How long trainings will take follows from the steps that were taken, or from a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flatlora_diffusion.compare.arms import PlannedRun, parse_arm, plan_runs
from flatlora_diffusion.compare.timing import step_seconds, training_seconds
from flatlora_diffusion.config import TrainConfig

START = 10.0  # seconds of a process before its first step


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, PlannedRun]:
    return planned(tmp_path)


def planned(tmp_path: Path, **settings: Any) -> dict[str, PlannedRun]:
    """Three arms of 100 steps of 2 x 3 images."""
    given = {"max_train_steps": 100, "train_batch_size": 2, "gradient_accumulation_steps": 3, "seed": 0, **settings}
    config = TrainConfig.from_dict({"output_dir": str(tmp_path), **given})
    arms = [parse_arm(key) for key in ("lora", "flat-lora", "sam:rho=0.1")]
    return {one.arm.key: one for one in plan_runs(config, arms, [0], 4)}


def take_steps(one: PlannedRun, seconds: list[float]) -> None:
    """So many steps, and a checkpoint behind them."""
    one.run.start(one.config.to_dict(), [])
    for step, took in enumerate(seconds):
        one.run.add_event({"event": "step", "step": step, "seconds": took})
    (one.run.folder / f"checkpoint-{len(seconds)}").mkdir()


def test_before_any_step_a_picture_says_how_long_it_takes(runs: dict[str, PlannedRun]) -> None:
    everything = list(runs.values())
    assert step_seconds(everything) == {}
    for key, passes in (("lora", 2.5), ("flat-lora", 2.75), ("sam:rho=0.1", 6.0)):
        assert training_seconds([runs[key]], everything, 0.1) == pytest.approx(START + 100 * 6 * passes * 0.1)


def test_times_come_from_the_steps_of_an_arm_or_of_another_by_passes(runs: dict[str, PlannedRun]) -> None:
    take_steps(runs["lora"], [9.0, 2.0, 2.0, 3.0, 2.0])
    everything = list(runs.values())
    assert step_seconds(everything) == {"lora": 2.0}
    assert training_seconds([runs["lora"]], everything, 99.0) == pytest.approx(START + 95 * 2.0)
    assert training_seconds([runs["sam:rho=0.1"]], everything, 99.0) == pytest.approx(START + 100 * 2.0 * 6.0 / 2.5)
    take_steps(runs["sam:rho=0.1"], [4.0] * 4)
    assert training_seconds([runs["sam:rho=0.1"]], everything, 99.0) == pytest.approx(START + 96 * 4.0)


def test_steps_of_other_settings_are_not_used(tmp_path: Path, runs: dict[str, PlannedRun]) -> None:
    take_steps(runs["lora"], [2.0] * 5)
    assert step_seconds(list(planned(tmp_path, rank=8).values())) == {}


def test_recomputed_layers_take_their_time(tmp_path: Path) -> None:
    plain, saving = planned(tmp_path), planned(tmp_path, gradient_checkpointing=True)
    for key in plain:
        one, other = [plain[key]], [saving[key]]
        assert 1.2 < training_seconds(other, other, 1.0) / training_seconds(one, one, 1.0) < 1.8
