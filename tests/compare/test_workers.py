"""Trainings at once: what they leave is what they leave one after the other, and a stop reaches all of them."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import HANGS, wait_until
from safetensors.torch import load_file

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.compare import parallel, worker_slots as of_workers
from flatlora_diffusion.compare.arms import PlannedRun, parse_arm, plan_runs, train_run
from flatlora_diffusion.compare.parallel import train_in_parallel
from flatlora_diffusion.compare.worker_slots import WorkerSlots, check_workers, worker_slots
from flatlora_diffusion.config import CompareConfig, ConfigError, RunError, TrainConfig
from flatlora_diffusion.storage.run_dir import LORA_FILE

Run = Callable[[Sequence[str], Path], int]


@pytest.fixture
def two(config: TrainConfig, tmp_path: Path) -> list[PlannedRun]:
    return planned_below(config, tmp_path / "experiment")


def planned_below(config: TrainConfig, out: Path) -> list[PlannedRun]:
    settings = config.replace(
        instance_prompt="an icon", output_dir=str(out), resolution=32, max_train_steps=2, seed=None
    )
    return plan_runs(settings, [parse_arm("lora"), parse_arm("flat-lora")], [0], 1)


def given(monkeypatch: pytest.MonkeyPatch, number: int, run: Run) -> None:
    """Have commands run by `run` in so many places."""

    @contextmanager
    def of_test(workers: int | None, cluster: str | None) -> Iterator[WorkerSlots]:
        yield WorkerSlots(number, run)

    monkeypatch.setattr(parallel, "worker_slots", of_test)


def draws(planned: PlannedRun) -> list[Any]:
    return [event["draws"] for event in planned.run.events() if event["event"] == "step"]


@pytest.mark.usefixtures("without_a_process")
def test_parallel_runs_equal_sequential_runs(
    config: TrainConfig, two: list[PlannedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, places_seen = threading.Lock(), set()

    def here(command: Sequence[str], log: str, environment: Any) -> int:
        places_seen.add(environment["OMP_NUM_THREADS"])
        with alone:  # processes would not share the generator of this one
            return main(list(command[3:]))

    monkeypatch.setattr(of_workers, "_exit_code", here)
    train_in_parallel(two, 2, None)
    apart = planned_below(config, tmp_path / "other")
    for one, other in zip(two, apart, strict=True):
        train_run(other)
        assert one.is_finished
        assert draws(one) == draws(other) != []
        learned = load_file(one.lora), load_file(other.lora)
        assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())
    assert places_seen == {"1"}
    monkeypatch.setattr(of_workers, "_exit_code", None)
    train_in_parallel(two, 2, None)  # nothing is left


def test_members_trained_in_parallel_have_the_same_average(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, commands = threading.Lock(), []

    def here(command: Sequence[str], log: str, environment: Any) -> int:
        commands.append(command)
        with alone:
            return main(list(command[3:]))

    monkeypatch.setattr(of_workers, "_exit_code", here)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(config.replace(members=2, max_train_steps=2).to_dict()), encoding="utf-8")
    train = ["train", "--config", str(settings)]
    assert main([*train, "--output_dir", str(tmp_path / "at-once"), "--workers", "2"]) == 0
    assert len(commands) == 2
    assert main([*train, "--output_dir", str(tmp_path / "one")]) == 0
    assert len(commands) == 2
    one, other = (load_file(tmp_path / name / LORA_FILE) for name in ("at-once", "one"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_workers_of_a_single_run_are_refused(icons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--instance_data_dir", str(icons), "--output_dir", str(tmp_path / "run"), "--workers", "2"]
    assert main(["train", *flags]) == 2
    assert "--members" in capsys.readouterr().err


def test_a_run_that_fails_stops_the_others_and_names_its_log(
    two: list[PlannedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, other_has_begun = two[1].run.stop_file, threading.Event()
    seen = []

    def run(command: Sequence[str], log: Path) -> int:
        if log.parent.name == "lora":
            other_has_begun.wait(HANGS)
            return 2
        other_has_begun.set()

        def is_asked_twice() -> bool:
            if stop.exists():
                stop.unlink()  # as a trainer does before its first step
                seen.append(stop)
            return len(seen) == 2

        wait_until(is_asked_twice)
        return 130

    given(monkeypatch, 2, run)
    monkeypatch.setattr(parallel, "STOP_INTERVAL", 0.01)
    with pytest.raises(RunError, match=r"LoRA, seed 0 ended with exit code 2.*seed-0\.log"):
        train_in_parallel(two, 2, None)
    assert len(seen) == 2, "what a run forgets that only begins is asked again"


@pytest.mark.parametrize("raises", [False, True])
def test_no_run_starts_after_a_failure(two: list[PlannedRun], monkeypatch: pytest.MonkeyPatch, raises: bool) -> None:
    begun = []

    def run(command: Sequence[str], log: Path) -> int:
        begun.append(log.parent.name)
        if raises:
            raise RunError("the cluster is gone")
        return 1

    given(monkeypatch, 1, run)
    with pytest.raises(RunError):
        train_in_parallel([*two, *two], None, "any")
    assert begun == ["lora"]


def test_each_slot_has_its_own_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    seen = []
    both = threading.Barrier(2)

    def told(command: Sequence[str], log: str, environment: Any) -> int:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        both.wait(HANGS)
        return 0

    monkeypatch.setattr(of_workers, "_exit_code", told)
    with worker_slots(2, None) as (number, run):
        threads = [threading.Thread(target=run, args=([], tmp_path / "log")) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(seen) == ["4", "7"]


def test_a_slot_runs_a_process_returns_its_exit_code_and_saves_its_log(tmp_path: Path) -> None:
    code = "import os, sys; print('shown'); sys.stderr.write(os.environ['OMP_NUM_THREADS']); raise SystemExit(3)"
    with worker_slots(2, None) as (number, run):
        assert number == 2
        assert run([sys.executable, "-c", code], tmp_path / "log") == 3
        assert run([sys.executable, "-c", ""], tmp_path / "other") == 0
    assert (tmp_path / "log").read_text(encoding="utf-8") == os.environ["OMP_NUM_THREADS"]
    assert (tmp_path / "other").read_bytes() == b""


def test_more_workers_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_workers(8, None)  # processes of a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_workers(2, None)
    with pytest.raises(ConfigError, match=r"workers=3 .* 2 CUDA devices"):
        check_workers(3, None)


def test_a_cluster_without_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_workers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "flatlora-diffusion\[cluster\]"'):
        check_workers(None, "auto")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, False), ({"workers": 1}, False), ({"workers": 2}, True), ({"cluster": "auto"}, True)],
)
def test_one_worker_trains_sequentially(settings: dict[str, Any], expected: bool) -> None:
    assert CompareConfig(**settings).trains_at_once == expected


@pytest.mark.long  # starts a cluster
def test_a_cluster_of_two_workers_trains(two: list[PlannedRun], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; the extra `dev` has it")
    with worker_slots(2, "local") as (number, run):
        assert number == 2
        assert run([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log") == 1
    assert (tmp_path / "log").read_text(encoding="utf-8").strip() == "no such thing"
    train_in_parallel(two, 2, "local")
    assert all(planned.is_finished for planned in two)
    assert draws(two[0]) == draws(two[1])
