"""The proof holds for runs that were alike and names what was not: hand-written run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flatlora_diffusion.compare.arms import PlannedRun, parse_arm, plan_runs
from flatlora_diffusion.compare.controls import make_controls
from flatlora_diffusion.compare.fairness_checks import shared_conditions
from flatlora_diffusion.config import TrainConfig

ARMS = ("lora", "flat-lora", "lora:rank=2", "lora:max_train_steps=1")


@pytest.fixture(params=[{}, {"sigma": 0.02}], ids=["", "a setting that LoRA has not"])
def runs(tmp_path: Path, request: Any) -> list[PlannedRun]:
    config = TrainConfig.from_dict({"output_dir": str(tmp_path), "max_train_steps": 2, **request.param})
    return _written(config, ARMS)


def _written(config: TrainConfig, arms: Sequence[str]) -> list[PlannedRun]:
    """The runs of these arms with two seeds, and their nulls, all alike."""
    parsed = [parse_arm(text) for text in arms]
    nulls = [null.arm for null in make_controls(parsed, 0)]
    planned = plan_runs(config, parsed, [0, 1], 1) + plan_runs(config, nulls, [0], 1)
    for one in planned:
        steps = 1 if one.arm.key == "lora:max_train_steps=1" else 2
        other = "other" if one.arm.key == "other-draws" else ""
        _write(one, lora=f"weights {one.config.adapter.rank} {one.seed}", draws=f"{other} {one.seed}", steps=steps)
    return planned


def test_runs_that_were_alike_are_proved_alike(runs: list[PlannedRun]) -> None:
    facts = shared_conditions(runs)
    assert all(fact["holds"] for fact in facts)
    assert len(facts) == 2 + 3 * 2
    assert len(facts[0]["hashes"]) == len(runs)
    weights, draws = facts[3], facts[4]
    assert "LoRA, rank 2, seed 0: another rank or other layers" in weights["note"]
    assert len(weights["hashes"]) == 6
    assert "LoRA with other draws, seed 0" in draws["note"]
    assert "LoRA, max_train_steps 1, seed 0" in draws["note"]


@pytest.mark.parametrize("arms", [("lora:rank=2", "flat-lora:rank=2"), ("lora:rank=2", "flat-lora"), ("sam", "lora")])
def test_nulls_of_any_arm_share_its_first_weights(tmp_path: Path, arms: Sequence[str]) -> None:
    runs = _written(TrainConfig.from_dict({"output_dir": str(tmp_path), "max_train_steps": 2}), arms)
    facts = shared_conditions(runs)
    assert all(fact["holds"] for fact in facts)
    of_first = {run.label for run in runs if run.seed == 0 and run.config.adapter.rank == runs[0].config.adapter.rank}
    assert set(facts[3]["hashes"]) == of_first


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"manifest": [{"sha256": "x", "caption_sha256": "y"}]}, "training images and captions"),
        ({"base": "another"}, "base model"),
        ({"config": {"learning_rate": 0.5}}, "all settings but the arm's own, seed 0"),
        ({"lora": "others"}, "initial weights of the LoRA, seed 0"),
        ({"draws": "others"}, "images, crops, noise and timesteps of every step, seed 0"),
    ],
)
def test_each_difference_is_found(runs: list[PlannedRun], change: dict[str, Any], broken: str) -> None:
    flat = runs[1]
    flat.run.events_file.unlink()
    _write(flat, **{"lora": "weights 4 0", "draws": " 0", "steps": 2, **change})
    assert [fact["what"] for fact in shared_conditions(runs) if not fact["holds"]] == [broken]


def test_a_run_that_recorded_no_start_is_not_called_alike(runs: list[PlannedRun]) -> None:
    lines = runs[0].run.events_file.read_text(encoding="utf-8").splitlines(keepends=True)
    runs[0].run.events_file.write_text("".join(lines[1:]), encoding="utf-8")
    assert [fact["what"] for fact in shared_conditions(runs) if not fact["holds"]] == [
        "base model",
        "initial weights of the LoRA, seed 0",
    ]


def _write(
    planned: PlannedRun,
    lora: str,
    draws: str,
    steps: int,
    base: str = "base",
    manifest: list[dict[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    rows = manifest or [{"sha256": "a", "caption_sha256": "b"}]
    planned.run.start({**planned.config.to_dict(), **(config or {})}, rows)
    planned.run.add_event({"event": "start", "base": base, "lora": lora})
    for step in range(steps):
        planned.run.add_event({"event": "step", "step": step, "draws": f"{draws} {step}"})
