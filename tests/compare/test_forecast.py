"""The expected time of each part of `evidence` is arithmetic on the steps, pictures and losses measured so far."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from flatlora_diffusion.compare import forecast as module
from flatlora_diffusion.compare.arms import PlannedRun, parse_arm, plan_runs, train_run
from flatlora_diffusion.compare.evaluator import RunEvaluator
from flatlora_diffusion.compare.forecast import Forecast, PlannedPart, measured_speeds
from flatlora_diffusion.compare.progress import WorkItem
from flatlora_diffusion.config import TrainConfig

START, STEPS = 10.0, 100
PICTURES, LOSSES = 3, 8  # of each run
PASSES = 20  # of a picture


class MadeUpEvaluator:
    """Counts what each run has to draw and measure, as one that has measured nothing."""

    def base_items(self) -> list[WorkItem]:
        return self.measurement_items(None)

    def measurement_items(self, planned: PlannedRun | None) -> list[WorkItem]:
        return [WorkItem("losses", LOSSES, int), WorkItem("pictures", PICTURES * PASSES, int, PICTURES)]

    def control_items(self, planned: PlannedRun) -> list[WorkItem]:
        return [WorkItem("losses", LOSSES, int)]


EVALUATOR = cast(RunEvaluator, MadeUpEvaluator())


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Forecast]:
    """A function that makes a forecast of three parts: two arms, an average of three more, and a control."""
    monkeypatch.setattr(module, "grid_items", lambda run, evaluator: [])
    values = {"max_train_steps": STEPS, "train_batch_size": 1, "seed": 0, "output_dir": str(tmp_path)}
    config = TrainConfig.from_dict(values)

    def runs(*keys: str) -> list[PlannedRun]:
        return plan_runs(config, [parse_arm(key) for key in keys], [0], 4)

    two = runs("lora", "flat-lora")
    three = runs("lora", "flat-lora", "lora:members=3")
    parts = [PlannedPart("two", two, []), PlannedPart("average", three, [])]
    parts.append(PlannedPart("controls", three, runs("lora:rank=8")))
    return lambda seconds_left=None: Forecast(parts, tmp_path, lambda: seconds_left)


def take_steps(planned: PlannedRun, seconds: float, steps: int) -> None:
    planned.run.start(planned.config.to_dict(), [])
    for step in range(steps):
        planned.run.add_event({"event": "step", "step": step, "seconds": seconds})


def finish(planned: PlannedRun, seconds: float) -> None:
    take_steps(planned, seconds, STEPS)
    planned.lora.touch()
    planned.run.add_event({"event": "finished", "step": STEPS})


def arms(forecast: Forecast) -> dict[str, PlannedRun]:
    return {planned.arm.key: planned for planned in forecast._runs}


def test_before_anything_is_measured_a_pass_says_how_long_it_takes(make: Callable[..., Forecast]) -> None:
    forecast = make()
    forecast.count(EVALUATOR)
    forecast.pass_seconds = 0.1
    lora, flat = 2.5 * 0.1 * STEPS + START, 2.75 * 0.1 * STEPS + START
    of_run = 0.1 * (LOSSES + PICTURES * PASSES)
    expected = [lora + flat + 3 * of_run, START + 2 * 2.5 * 0.1 * STEPS + of_run, lora + 0.1 * LOSSES]
    assert forecast.part_seconds() == pytest.approx(expected), "the average shares a member with LoRA"
    assert not any(line.startswith("Measured") for line in forecast.lines())


def test_measured_steps_pictures_and_losses_replace_it(make: Callable[..., Forecast]) -> None:
    forecast = make()
    forecast.count(EVALUATOR)
    forecast.pass_seconds = 0.1
    lora, flat = arms(forecast)["lora"], arms(forecast)["flat-lora"]
    finish(lora, 2.0)
    of_run = 0.1 * (LOSSES + PICTURES * PASSES)
    expected = 2.0 * 2.75 / 2.5 * STEPS + START
    assert forecast.part_seconds()[0] == pytest.approx(expected + 3 * of_run), "by the passes of a step"
    take_steps(flat, 3.0, 10)
    assert forecast.part_seconds()[0] == pytest.approx(3.0 * STEPS + START + 3 * of_run)
    forecast.item_done(WorkItem("the base", 2 * PASSES, int, 2), 8.0)
    forecast.item_done(WorkItem("the base", LOSSES, int), 4.0)
    drawing, losses = 8.0 / (2 * PASSES), 4.0 / LOSSES
    left = (3 * PICTURES - 2) * PASSES * drawing + 2 * LOSSES * losses
    assert forecast.part_seconds()[0] == pytest.approx(3.0 * STEPS + START + left)
    assert forecast.part_seconds()[2] == pytest.approx(START + (2.0 + 3.0 / 1.1) / 2 * STEPS + losses * LOSSES)
    first, *others = forecast.lines()
    assert (
        first == "Measured: 2.00 s per step of lora, 3.00 s per step of flat-lora, 4.00 s per picture, 0.50 s per loss"
    )
    assert len(others) == 3


def test_speeds_outlive_a_stop_and_a_finished_part_takes_no_time(
    make: Callable[..., Forecast], tmp_path: Path
) -> None:
    before = make()
    before.count(EVALUATOR)
    before.pass_seconds = 0.1
    for key, seconds in (("lora", 2.0), ("flat-lora", 2.2)):  # as their passes
        finish(arms(before)[key], seconds)
    for _ in range(3):
        for item in EVALUATOR.base_items():
            before.item_done(item, 6.0)
    assert before.part_seconds()[0] == 0
    assert before.part_seconds()[1] == pytest.approx(START + 2 * 2.0 * STEPS + 6.0 + 6.0)
    assert make().part_seconds()[1] == pytest.approx(START + 2 * 2.0 * STEPS), "not counted yet"
    assert measured_speeds(tmp_path)["pictures"] == (9, 9 * PASSES, 18.0)
    assert not any("Part 1 of 3" in line for line in before.lines())


def test_parts_that_do_not_fit_the_hours_are_named(make: Callable[..., Forecast]) -> None:
    def named(seconds_left: float) -> list[str]:
        forecast = make(seconds_left)
        forecast.count(EVALUATOR)
        forecast.pass_seconds = 1.0
        return [line.split(",")[0] for line in forecast.lines() if "--hours" in line]

    forecast = make()
    forecast.count(EVALUATOR)
    forecast.pass_seconds = 1.0
    one, two, three = forecast.part_seconds()
    assert named(one + two + three + 1) == []
    assert named(one + two + 1) == ["Part 3 of 3"]
    assert named(1) == ["Part 2 of 3", "Part 3 of 3"], "the first part always runs"


def test_the_first_ten_steps_of_each_arm_give_a_new_estimate(
    make: Callable[..., Forecast], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecast = make()
    lora = arms(forecast)["lora"]
    lora.run.start(lora.config.to_dict(), [])

    class Training:
        """A training that takes a step whenever it is looked at."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.steps = 0

        def __enter__(self) -> Training:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self, timeout: float) -> int:
            if self.steps == 12:
                return 0
            lora.run.add_event({"event": "step", "step": self.steps, "seconds": 2.0})
            self.steps += 1
            raise subprocess.TimeoutExpired("train", timeout)

    monkeypatch.setattr("flatlora_diffusion.compare.arms.subprocess.Popen", Training)
    with caplog.at_level("INFO"):
        train_run(lora, forecast.watch)
    assert [record.message for record in caplog.records if "Measured" in record.message] == [
        "Measured: 2.00 s per step of lora"
    ]
