"""The errors of a run that cannot go on: out of memory, or an operation without a deterministic kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import samples_of

from flatlora_diffusion.config import RunError, TrainConfig
from flatlora_diffusion.memory import preflight
from flatlora_diffusion.training import failure
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train


def test_an_out_of_memory_error_ends_with_advice(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("flatlora_diffusion.training.trainer.train_step", full)
    with pytest.raises(RunError, match=r"out of memory; these settings need about[\s\S]*--mixed_precision bf16 saves"):
        train(config)


@pytest.mark.parametrize(("is_main", "fails"), [(True, False), (True, True), (False, False)])
def test_the_first_process_logs_the_memory_of_its_gpu_or_continues_without(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any, is_main: bool, fails: bool
) -> None:
    gpu, asked = torch.device("cuda", 3), []

    def free_and_all(device: Any) -> tuple[int, int]:
        asked.append(device)
        if fails:
            raise RuntimeError("no driver")
        return 7 * 2**30, 8 * 2**30

    monkeypatch.setattr(preflight, "this_process", lambda: SimpleNamespace(device=gpu, is_main_process=is_main))
    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_all)
    with caplog.at_level("INFO"):
        assert train(config.replace(max_train_steps=1)).is_file()
    assert asked == ([gpu] if is_main else [])
    assert ("7.0 GiB free" in caplog.text) is (is_main and not fails)
    assert ("no driver" in caplog.text) is fails


def test_an_out_of_memory_error_is_reported_even_if_the_estimate_fails(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(*_: Any) -> str:
        raise KeyError("vae")

    monkeypatch.setattr("flatlora_diffusion.training.trainer.train_step", full)
    monkeypatch.setattr("flatlora_diffusion.memory.estimate.out_of_memory_text", broken)
    with pytest.raises(RunError, match="the device is out of memory; lower --train_batch_size or --resolution"):
        train(config)
    assert "could not be estimated: 'vae'" in caplog.text


@pytest.mark.parametrize(("given", "expected"), [(None, "bf16"), ("no", "no")])
def test_memory_is_estimated_for_the_launcher_s_precision_unless_one_is_given(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    gpu, precisions = torch.device("cuda", 0), []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(preflight, "this_process", lambda: SimpleNamespace(device=gpu, is_main_process=True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7, 8))

    def lines(config: TrainConfig, _: int) -> list[str]:
        precisions.append(config.optim.mixed_precision)
        return ["enough"]

    monkeypatch.setattr("flatlora_diffusion.memory.estimate.preflight_lines", lines)
    train(config.replace(max_train_steps=1, mixed_precision=given))
    assert precisions == [expected]


@pytest.mark.parametrize("stage", ["prepare", "load_class_samples"])
def test_out_of_memory_before_the_first_step_ends_alike(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"flatlora_diffusion.training.trainer.{stage}", full)
    with pytest.raises(RunError, match="out of memory; these settings need about"):
        train(config)


@pytest.fixture
def restored_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the choice of kernels, which is global."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("restored_kernels")
def test_deterministic_refuses_an_operation_that_is_not(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> None:
        torch.empty(1).put_(torch.tensor([0]), torch.ones(1))  # has no deterministic kernel on any device

    monkeypatch.setattr("flatlora_diffusion.training.trainer.train_step", step)
    end = "leave --deterministic out; no checkpoint was saved yet"
    with pytest.raises(RunError, match=f"^put_ has no deterministic kernel on this device; {end}$"):
        train(config.replace(deterministic=True))


@pytest.mark.usefixtures("restored_kernels")
def test_class_images_are_drawn_with_deterministic_kernels_too(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: list[tuple[bool, str | None]] = []

    def load(_: TrainConfig) -> list[Any]:
        kernels.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return []

    monkeypatch.setattr("flatlora_diffusion.training.trainer.load_class_samples", load)
    train(config.replace(deterministic=True))
    assert kernels == [(True, ":4096:8")]
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_the_state_of_a_method_is_checked_before_it_is_saved(config: TrainConfig) -> None:
    state = prepare(config.replace(method="bi-lora"), samples_of(config))
    assert failure._is_finite(state)
    with torch.no_grad():
        state.gradient.state()[0]["parameter.0"].view(-1)[0] = float("nan")
    assert not failure._is_finite(state)
