"""A run that stops early loses nothing: stop requests, signals, kills, full disks, longer runs."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from flatlora_diffusion import checkpoint, tensor_file
from flatlora_diffusion.config import ConfigError, RunError, StoppedError, TrainConfig
from flatlora_diffusion.lora_file import LORA_FILE
from flatlora_diffusion.run_dir import RunDir
from flatlora_diffusion.trainer import train

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(base: Path, icons: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(base),
            "instance_data_dir": str(icons),
            "output_dir": str(tmp_path / "run"),
            "max_train_steps": 6,
            "train_batch_size": 1,
            "learning_rate": 1e-2,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 0,
            "report_to": "none",
            "seed": 3,
        }
    )


def arguments(config: TrainConfig) -> list[str]:
    settings = {"output_dir", "max_train_steps", "train_batch_size", "learning_rate", "lr_scheduler", "seed"}
    settings |= {"pretrained_model_name_or_path", "instance_data_dir", "lr_warmup_steps", "report_to"}
    settings |= {"checkpointing_steps", "resume_from_checkpoint"}
    given = {name: value for name, value in config.to_dict().items() if name in settings and value is not None}
    return ["train_dreambooth_flatlora.py", *(f"--{name}={value}" for name, value in given.items())]


def launch(config: TrainConfig) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments(config)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def wait_for_step(run: RunDir, process: subprocess.Popen[str], step: int) -> None:
    while not any(event["event"] == "step" and event["step"] >= step for event in run.events()):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)


def assert_same_lora(one: Path, two: Path) -> None:
    a, b = load_file(one / LORA_FILE), load_file(two / LORA_FILE)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_a_stop_file_ends_the_run_after_the_step_and_it_goes_on_as_if_nothing_was(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config.replace(output_dir=str(tmp_path / "whole")))
    run = RunDir(Path(config.run.output_dir))
    with monkeypatch.context() as patch:
        patch.setattr(
            RunDir, "add_event", lambda self, event, plain=RunDir.add_event: _and_touch(plain, self, event, 2)
        )
        with pytest.raises(StoppedError, match="stopped after step 3 by the stop file; --resume_from_checkpoint"):
            train(config)
    assert run.events()[-1] == {"event": "stopped", "step": 3, "reason": "the stop file"}
    assert not (run.folder / LORA_FILE).exists()
    assert (run.folder / "checkpoint-3" / LORA_FILE).exists()
    train(config.replace(resume_from_checkpoint="latest"))
    assert_same_lora(run.folder, tmp_path / "whole")


def _and_touch(plain: Any, run: RunDir, event: dict[str, Any], after: int, name: str = "stop") -> None:
    plain(run, event)
    if event["event"] == "step" and event["step"] == after:
        (run.folder / name).touch()


def test_a_save_file_asks_for_a_checkpoint_and_the_run_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        RunDir, "add_event", lambda self, event, plain=RunDir.add_event: _and_touch(plain, self, event, 1, "save")
    )
    train(config)
    run = RunDir(Path(config.run.output_dir))
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2"]
    assert not run.save_file.exists()


def test_a_run_stops_when_its_time_is_up(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr("flatlora_diffusion.stopping.time.monotonic", lambda: next(clock))
    with pytest.raises(StoppedError, match="by max_train_seconds=7"):
        train(config.replace(max_train_seconds=7.0))
    assert RunDir(Path(config.run.output_dir)).checkpoints()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM cannot be sent to a process there")
def test_sigterm_saves_and_exits_with_3(config: TrainConfig) -> None:
    run = RunDir(Path(config.run.output_dir))
    process = launch(config.replace(max_train_steps=10_000))
    wait_for_step(run, process, 2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3, error
    assert "by SIGTERM; --resume_from_checkpoint latest goes on" in error
    step = run.events()[-1]["step"]
    assert run.checkpoints()[-1].name == f"checkpoint-{step}"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_lora(config: TrainConfig, tmp_path: Path) -> None:
    """Killed at arbitrary moments, three times: what is there is loadable, and the end is the unbroken one's."""
    steps = 60
    whole = config.replace(max_train_steps=steps, checkpointing_steps=1, checkpoints_total_limit=3)
    train(whole.replace(output_dir=str(tmp_path / "whole")))
    broken = whole.replace(output_dir=str(tmp_path / "broken"))
    run = RunDir(tmp_path / "broken")
    rng = random.Random(0)
    for attempt in range(3):
        resume = "latest" if attempt else None
        process = launch(broken.replace(resume_from_checkpoint=resume))
        seen = max((event["step"] for event in run.events() if event["event"] == "step"), default=0)
        wait_for_step(run, process, seen + 3)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
        newest = run.checkpoints()[-1]
        StableDiffusionXLPipeline.lora_state_dict(newest)
    train(broken.replace(resume_from_checkpoint="latest"))
    assert_same_lora(tmp_path / "whole", tmp_path / "broken")


def test_a_run_can_go_on_for_longer_and_follows_the_new_end(config: TrainConfig, caplog: Any) -> None:
    train(config.replace(checkpointing_steps=4, max_train_steps=4))
    with caplog.at_level("INFO"):
        train(config.replace(checkpointing_steps=4, max_train_steps=8, resume_from_checkpoint="latest"))
    assert "8 steps in place of 4: learning rate and sigma follow the new end" in caplog.text
    run = RunDir(Path(config.run.output_dir))
    steps = [event for event in run.events() if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(8))
    fresh = [0.01 * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) / 2 for step in range(4, 8)]
    assert [event["lr"] for event in steps[4:]] == pytest.approx(fresh, rel=1e-5)
    assert steps[4]["sigma"] == pytest.approx(0.05)
    assert json.loads(run.config_file.read_text())["max_train_steps"] == 8


def test_a_run_of_epochs_goes_on_for_more_epochs(config: TrainConfig, caplog: Any) -> None:
    epochs = config.replace(max_train_steps=None, num_train_epochs=2, checkpointing_steps=3)
    train(epochs)
    again = epochs.replace(resume_from_checkpoint="latest")
    with caplog.at_level("INFO"):
        train(again.replace(num_train_epochs=5))
    assert "15 steps in place of 6" in caplog.text
    assert "resuming from checkpoint-6; steps left: 9" in caplog.text
    run = RunDir(Path(config.run.output_dir))
    assert [event["step"] for event in run.events() if event["event"] == "step"] == list(range(15))
    with caplog.at_level("INFO"):
        train(again.replace(num_train_epochs=1))  # what it is when the flag is left out
    assert "resuming from checkpoint-15; steps left: 0" in caplog.text
    assert run.config()["max_train_steps"] == 15


def test_a_full_disk_keeps_the_last_good_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = tensor_file.save_file, []

    def full(tensors: Any, path: Any, **rest: Any) -> None:
        calls.append(path)
        if len(calls) > 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path, **rest)

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(RunError, match="No space left on device; the last good checkpoint is checkpoint-2"):
        train(config.replace(checkpointing_steps=1))
    run = RunDir(Path(config.run.output_dir))
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.setattr(tensor_file, "save_file", plain)
    train(config.replace(resume_from_checkpoint="latest"))
    assert (run.folder / LORA_FILE).exists()


def test_an_event_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.add_event({"event": "step", "step": 0})
    for fragment in (b'{"event": "st', b"\0\0\xff\xfe"):
        with open(run.events_file, "ab") as file:
            file.write(fragment)
        before = run.events()
        run.add_event({"event": "step", "step": len(before)})
        assert run.events() == [*before, {"event": "step", "step": len(before)}]
    assert [event["step"] for event in run.events()] == [0, 1, 2]


def test_resume_refuses_another_optimizer_and_takes_another_log(config: TrainConfig) -> None:
    train(config.replace(checkpointing_steps=3))
    with pytest.raises(ConfigError, match="checkpoint-6 was made with optimizer='adamw', not 'adafactor'"):
        train(config.replace(resume_from_checkpoint="latest", optimizer="adafactor"))
    train(
        config.replace(
            resume_from_checkpoint="checkpoint-3", output_name="x", dataloader_num_workers=1, validation_epochs=9
        )
    )


def test_a_checkpoint_of_another_lora_is_refused(config: TrainConfig) -> None:
    train(config.replace(checkpointing_steps=6))
    run = RunDir(Path(config.run.output_dir))
    saved = json.loads(run.config_file.read_text())
    run.config_file.write_text(json.dumps({**saved, "rank": 2}))
    with pytest.raises(ConfigError, match="checkpoint-6 holds another LoRA"):
        train(config.replace(resume_from_checkpoint="latest", rank=2))
    assert checkpoint.STATE_FILE in {path.name for path in run.checkpoints()[-1].iterdir()}
