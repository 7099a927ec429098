"""A member that another run of a comparison has trained is copied: the average is that of members trained anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flatlora_diffusion.compare.arms import PlannedRun, parse_arm, plan_runs
from flatlora_diffusion.compare.members import copy_shared_members
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.training.trainer import train


def planned(config: TrainConfig, *arms: str) -> list[PlannedRun]:
    two_steps = config.replace(max_train_steps=2, seed=None)
    return plan_runs(two_steps, [parse_arm(arm) for arm in arms], [3], 1)


def trained(runs: list[PlannedRun], lends: bool) -> list[PlannedRun]:
    for one in runs:
        if lends:
            copy_shared_members(one, runs)
        train(one.config)
    return runs


def test_the_average_with_a_copied_member_equals_that_of_a_trained_member(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arms = ("lora", "lora:members=2")
    with caplog.at_level("INFO"):
        lora, lent = trained(planned(config, *arms), lends=True)
        assert "member 1 of 2: already trained" in caplog.text
        assert "member 2 of 2: trains" in caplog.text
        caplog.clear()
        (own,) = trained(planned(config.replace(output_dir=str(tmp_path / "anew")), arms[1]), lends=False)
        assert "already trained" not in caplog.text
    values, others = load_file(lent.lora), load_file(own.lora)
    assert all(torch.equal(value, others[name]) for name, value in values.items())
    assert not torch.equal(next(iter(values.values())), next(iter(load_file(lora.lora).values())))


def test_a_run_of_other_settings_is_not_copied_as_a_member(config: TrainConfig) -> None:
    runs = planned(config, "lora", "flat-lora:members=2", "lora:members=2,learning_rate=0.001")
    train(runs[0].config)
    for one in runs[1:]:
        copy_shared_members(one, runs)
        assert not one.run.member(1).folder.exists()
