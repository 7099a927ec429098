"""A run that stops early loses nothing: stop requests, signals, kills, full disks, longer runs."""

from __future__ import annotations

import errno
import json
import math
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from forked import ended, forked
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.commands import command_line
from flatlora_diffusion.compare.arms import parse_arm, plan_runs
from flatlora_diffusion.compare.comparison import compare
from flatlora_diffusion.config import CompareConfig, ConfigError, RunError, StoppedError, TrainConfig
from flatlora_diffusion.lora_files.diffusers_file import LORA_FILE
from flatlora_diffusion.signals import Interrupted, interruptible
from flatlora_diffusion.storage import tensor_io as tensor_file
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.run_lock import lock_folder
from flatlora_diffusion.training import checkpoint, finish, micro_batches, trainer
from flatlora_diffusion.training.previews import Previews
from flatlora_diffusion.training.trainer import train


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
    return [f"--{name}={value}" for name, value in given.items()]


def wait_for_step(run: RunDir, is_alive: Callable[[], bool], said: Path, step: int) -> None:
    while not any(event["event"] == "step" and event["step"] >= step for event in run.events()):
        assert is_alive(), said.read_text(encoding="utf-8")
        time.sleep(0.02)


def assert_same_lora(first: Path, second: Path) -> None:
    a, b = load_file(first / LORA_FILE), load_file(second / LORA_FILE)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_a_stop_file_ends_the_run_after_the_step_and_it_resumes_bit_for_bit(
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


def test_a_stop_skips_the_previews(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        RunDir, "add_event", lambda self, event, plain=RunDir.add_event: _and_touch(plain, self, event, 1)
    )
    images = config.data.instance_data_dir
    with pytest.raises(StoppedError, match="stopped after step 2"):
        train(config.replace(validation_prompt="an icon", num_validation_images=2, validation_data_dir=images))
    run = RunDir(Path(config.run.output_dir))
    assert {path.name for path in run.images.iterdir()} == {"base-0.png", "base-1.png"}, "epoch 1 ends with step 2"
    assert [event["step"] for event in run.events() if event["event"] in ("preview", "validation")] == [0, 0]


def _and_touch(plain: Any, run: RunDir, event: dict[str, Any], after: int, name: str = "stop") -> None:
    plain(run, event)
    if event["event"] == "step" and event["step"] == after:
        (run.folder / name).touch()


def test_a_save_file_saves_a_checkpoint_and_the_run_continues(
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
    clock = SimpleNamespace(monotonic=iter(range(0, 10_000, 3)).__next__)  # three seconds a step
    monkeypatch.setattr("flatlora_diffusion.training.stopping.time", clock)
    with pytest.raises(StoppedError, match="stopped after step 2 by max_train_seconds=5"):
        train(config.replace(max_train_seconds=5.0))
    assert [path.name for path in RunDir(Path(config.run.output_dir)).checkpoints()] == ["checkpoint-2"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM cannot be sent to a process there")
def test_sigterm_saves_and_exits_with_3(config: TrainConfig, tmp_path: Path) -> None:
    run = RunDir(Path(config.run.output_dir))
    said = tmp_path / "said.txt"
    process = forked(said, {}, arguments(config.replace(max_train_steps=10_000)))
    wait_for_step(run, process.is_alive, said, 2)
    process.terminate()
    assert ended(process) == 3
    assert "by SIGTERM; --resume_from_checkpoint latest goes on" in said.read_text(encoding="utf-8")
    step = run.events()[-1]["step"]
    assert run.checkpoints()[-1].name == f"checkpoint-{step}"


@pytest.mark.parametrize(
    ("steps", "kills", "seconds"), [(20, 1, 0.0), pytest.param(45, 2, 0.3, marks=pytest.mark.long)]
)
def test_a_killed_run_resumes_to_the_same_lora(
    config: TrainConfig, tmp_path: Path, steps: int, kills: int, seconds: float
) -> None:
    """Killed at arbitrary moments: its files load, and the result equals that of an unbroken run."""
    whole = config.replace(max_train_steps=steps, checkpointing_steps=1, checkpoints_total_limit=3)
    train(whole.replace(output_dir=str(tmp_path / "whole")))
    broken = whole.replace(output_dir=str(tmp_path / "broken"))
    run = RunDir(tmp_path / "broken")
    rng = random.Random(0)
    for attempt in range(kills):
        resume = "latest" if attempt else None
        said = tmp_path / f"said-{attempt}.txt"
        process = forked(said, {}, arguments(broken.replace(resume_from_checkpoint=resume)))
        seen = max((event["step"] for event in run.events() if event["event"] == "step"), default=0)
        wait_for_step(run, process.is_alive, said, seen + 3)
        time.sleep(rng.random() * seconds)
        process.kill()
        process.join()
        newest = run.checkpoints()[-1]
        StableDiffusionXLPipeline.lora_state_dict(newest)
    train(broken.replace(resume_from_checkpoint="latest"))
    assert_same_lora(tmp_path / "whole", tmp_path / "broken")


def test_a_finished_run_is_extended_at_full_sigma_and_with_the_rate_of_the_new_end(
    config: TrainConfig, caplog: Any
) -> None:
    ramped = config.replace(
        sigma_schedule="cosine", lr_scheduler="cosine", lr_warmup_steps=0, checkpointing_steps=4, max_train_steps=4
    )
    train(ramped)
    longer = ramped.replace(max_train_steps=8, resume_from_checkpoint="latest")
    with caplog.at_level("INFO"):
        train(longer)
    assert re.search(r"8 steps .* 4: .*\(cosine\) .* 0.005 from here on", caplog.text)
    assert "sigma's ramp has ended, 0.1 from here on" in caplog.text
    run = RunDir(Path(config.run.output_dir))
    steps = [event for event in run.events() if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(8))
    fresh = [0.01 * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) / 2 for step in range(4, 8)]
    assert [event["lr"] for event in steps[4:]] == pytest.approx(fresh, rel=1e-5)
    assert [event["sigma"] for event in steps[4:]] == [0.1] * 4
    saved = json.loads(run.config_file.read_text())
    assert (saved["max_train_steps"], saved["sigma_ramp_steps"]) == (8, 4)
    train(longer.replace(max_train_steps=9))
    assert run.events()[-1]["event"] == "finished"
    assert [event["sigma"] for event in run.events() if event["event"] == "step"][-1] == 0.1


def test_a_run_that_was_stopped_follows_a_new_end_with_its_ramp(config: TrainConfig, caplog: Any) -> None:
    ramped = config.replace(sigma_schedule="cosine", max_train_steps=4, checkpointing_steps=2)
    train(ramped)
    with caplog.at_level("INFO"):
        train(ramped.replace(max_train_steps=8, resume_from_checkpoint="checkpoint-2"))
    assert re.search(r"sigma's ramp follows .* 0.0146 from here on", caplog.text)
    steps = [event for event in RunDir(Path(config.run.output_dir)).events() if event["event"] == "step"]
    assert steps[-1]["sigma"] == pytest.approx(0.1 * (1 - math.cos(math.pi * 7 / 8)) / 2)


def test_a_finished_run_without_a_checkpoint_is_not_overwritten(config: TrainConfig) -> None:
    path = train(config.replace(max_train_steps=1))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"output_dir=.*finished run.* --init_lora"):
        train(config.replace(max_train_steps=2, resume_from_checkpoint="latest"))
    assert path.read_bytes() == before


def test_a_run_of_epochs_resumes_for_more_epochs(config: TrainConfig, caplog: Any) -> None:
    epochs = config.replace(max_train_steps=None, num_train_epochs=2, checkpointing_steps=3)
    train(epochs)
    again = epochs.replace(resume_from_checkpoint="latest")
    with caplog.at_level("INFO"):
        train(again.replace(num_train_epochs=5))
    assert re.search(r"15 steps .* 6: ", caplog.text)
    assert "resuming from checkpoint-6; 9 steps left" in caplog.text
    run = RunDir(Path(config.run.output_dir))
    assert [event["step"] for event in run.events() if event["event"] == "step"] == list(range(15))
    with caplog.at_level("INFO"):
        train(again.replace(num_train_epochs=1))  # the default
    assert "resuming from checkpoint-15; 0 steps left" in caplog.text
    assert run.config()["max_train_steps"] == 15


def test_a_full_disk_keeps_the_last_good_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = tensor_file.save_file, []

    def full(tensors: Any, path: Any, **rest: Any) -> None:
        calls.append(path)
        if len(calls) > 2:
            Path(path).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        plain(tensors, path, **rest)

    monkeypatch.setattr(tensor_file, "save_file", full)
    complaint = "the run folder cannot be written: No space left on device; the last good checkpoint is checkpoint-2"
    with pytest.raises(RunError, match=complaint):
        train(config.replace(checkpointing_steps=1))
    run = RunDir(Path(config.run.output_dir))
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.setattr(tensor_file, "save_file", plain)
    train(config.replace(resume_from_checkpoint="latest"))
    assert (run.folder / LORA_FILE).exists()


def test_a_cut_event_loses_only_itself(tmp_path: Path) -> None:
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
    with pytest.raises(ConfigError, match=r"checkpoint-6 .*rank"):
        train(config.replace(resume_from_checkpoint="latest", rank=2))
    assert checkpoint.STATE_FILE in {path.name for path in run.checkpoints()[-1].iterdir()}


# The end of a run


def at_the_end(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have the last previews `act` before they are made."""
    real = Previews.make

    def make(self: Previews, name: str, step: int, *is_over: Any) -> None:
        if name == "step-6":
            act()
        real(self, name, step, *is_over)

    monkeypatch.setattr(Previews, "make", make)


def test_failing_previews_at_the_end_keep_the_result(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at_the_end(monkeypatch, raising(OSError(errno.ENOSPC, "No space left on device")))
    path = train(config.replace(validation_prompt="an icon", num_validation_images=1))
    assert load_file(path)
    assert RunDir(path.parent).ending() == {"event": "finished", "step": 6}
    assert "the LoRA is saved, but its last previews could not be made: [Errno 28] No space left" in caplog.text
    assert (path.parent / "README.md").is_file(), "the card does without them"


def test_a_signal_during_the_last_previews_leaves_the_lora_and_logs_its_path(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_end(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    complaint = r"stopped by SIGINT after the LoRA was saved in .*\.safetensors; last previews"
    with pytest.raises(Interrupted, match=complaint), interruptible():
        train(config)
    run = RunDir(Path(config.run.output_dir))
    assert load_file(run.folder / LORA_FILE)
    assert run.ending() == {"event": "finished", "step": 6}


def test_a_signal_while_the_result_is_saved_waits_until_it_is(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finish.save_lora

    def save(*args: Any, **more: Any) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **more)

    monkeypatch.setattr(finish, "save_lora", save)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after the LoRA was saved in"):
        train(config)
    assert RunDir(Path(config.run.output_dir)).ending() == {"event": "finished", "step": 6}


@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_while_a_run_closes_is_raised_afterwards_and_hides_no_failure(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    class Owner:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    real = Accelerator.free_memory

    def free_memory(self: Accelerator) -> Any:
        Owner()  # its finalizer runs here; Python prints and discards exceptions in finalizers
        return real(self)

    monkeypatch.setattr(Accelerator, "free_memory", free_memory)
    if fails:
        fail_at(monkeypatch, 2, lambda loss: loss * float("nan"))
    before = signal.getsignal(signal.SIGINT)
    assert command_line.train_main(arguments(config)) == (1 if fails else 130)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(
        "error: the loss of step 2 is not finite"
        if fails
        else f"error: stopped by SIGINT after the LoRA was saved in {Path(config.run.output_dir) / LORA_FILE}; nothing"
    )
    assert signal.getsignal(signal.SIGINT) == before


def test_a_result_that_cannot_be_saved_leaves_a_checkpoint_to_save_it_from(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(finish, "save_lora", raising(RunError("the file does not hold what was to be saved")))
        with pytest.raises(RunError, match=r"to be saved; checkpoint-6 has the weights .*--resume"):
            train(config)
    path = train(config.replace(resume_from_checkpoint="latest"))
    assert load_file(path)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **more: Any) -> Any:
        raise error

    return fail


# A run that fails


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Tensor], Tensor]) -> None:
    """Have `act` change the loss of a step."""
    calls: list[int] = []
    real = micro_batches.diffusion_loss

    def loss(*args: Any) -> Tensor:
        calls.append(0)
        return act(real(*args)) if len(calls) == step + 1 else real(*args)

    monkeypatch.setattr(micro_batches, "diffusion_loss", loss)


def test_a_nonfinite_loss_keeps_the_weights_before_it_and_gives_valid_advice(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(checkpointing_steps=2, checkpoints_total_limit=1, lr_scheduler="constant")
    with monkeypatch.context() as patch:
        fail_at(patch, 3, lambda loss: loss * float("nan"))
        with pytest.raises(
            RunError, match=r"step 3 is not finite .* a lower --learning_rate; checkpoint-3 has the weights"
        ):
            train(config)
    run = RunDir(Path(config.run.output_dir))
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2", "checkpoint-3"], (
        "no good checkpoint is deleted"
    )
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process, which may have another precision
    lower = config.replace(resume_from_checkpoint="latest", learning_rate=1e-3)
    train(lower.replace(mixed_precision="bf16", gradient_checkpointing=True))
    (resumed,) = [event for event in run.events() if event["event"] == "resumed"]
    assert resumed == {
        "event": "resumed",
        "step": 3,
        "changed": {
            "gradient_checkpointing": [False, True],
            "learning_rate": [1e-2, 1e-3],
            "mixed_precision": ["no", "bf16"],
        },
    }
    assert [event["lr"] for event in run.events() if event["event"] == "step"] == [1e-2] * 3 + [1e-3] * 3
    assert run.config()["learning_rate"] == 1e-3


@pytest.mark.parametrize("cached", [False, True])
def test_deleted_images_are_named_and_the_weights_are_saved(
    config: TrainConfig, icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    folder = shutil.copytree(icons, tmp_path / "pictures")
    plain = RunDir.add_event

    def delete(self: RunDir, event: dict[str, Any]) -> None:
        plain(self, event)
        if event.get("step") == 2:
            for image in folder.glob("*.png"):
                image.unlink()

    monkeypatch.setattr(RunDir, "add_event", delete)
    with pytest.raises(
        RunError,
        match=r"step 3: icon-\d.png .*No such file .*; checkpoint-3 has",
    ):
        train(config.replace(instance_data_dir=str(folder), cache_latents=cached, alpha_mask_loss=cached))


def test_any_other_error_is_raised_as_it_is_and_the_weights_are_saved(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_at(monkeypatch, 2, raising(ConnectionError("gone")))
    with pytest.raises(ConnectionError, match="gone"):
        train(config)
    assert "checkpoint-2 has the weights" in caplog.text
    assert [path.name for path in RunDir(Path(config.run.output_dir)).checkpoints()] == ["checkpoint-2"]


def test_a_failing_tracker_does_not_affect_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", raising(ConnectionError("no network")))
    train(config.replace(report_to="tensorboard"))
    assert caplog.text.count("the tracker failed") == 1
    assert "no network" in caplog.text


# Two runs, one folder


def test_a_second_run_in_a_folder_is_refused_before_anything_is_moved(config: TrainConfig) -> None:
    path = train(config.replace(checkpointing_steps=6))
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    assert not (path.parent / ".lock").exists()
    with lock_folder(path.parent, "output_dir"):
        for resume in (None, "latest"):
            with pytest.raises(ConfigError, match=r"output_dir=.*"):
                train(config.replace(resume_from_checkpoint=resume))
        with pytest.raises(ConfigError, match=r"output_dir=.*"):
            compare(config, CompareConfig())
        before[path.parent / ".lock"] = b""
        assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before


# Signals before the first step


@pytest.mark.parametrize("place", ["load_training_set", "prepare"])
def test_a_signal_while_all_is_loaded_ends_in_one_sentence(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.setattr(trainer, place, lambda *args: signal.raise_signal(signal.SIGTERM))
    assert command_line.train_main(arguments(config)) == 143
    assert capsys.readouterr().err.endswith("error: stopped by SIGTERM before the first step; nothing was trained\n")
    assert not Path(config.run.output_dir).exists()


def test_a_signal_at_the_base_s_previews_ends_in_one_sentence(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Previews, "make", lambda *args: signal.raise_signal(signal.SIGINT))
    assert command_line.train_main(arguments(config)) == 130
    assert capsys.readouterr().err.endswith("error: stopped by SIGINT before the first step; nothing was trained\n")


def test_a_second_signal_ends_the_process_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible():
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


def test_the_threads_that_load_images_end_with_the_run(config: TrainConfig) -> None:
    before = set(threading.enumerate())  # an earlier test may have left threads of its own
    train(config.replace(dataloader_num_workers=2))
    assert not [thread for thread in set(threading.enumerate()) - before if "ThreadPoolExecutor" in thread.name]


# A disk that is full before the first step


@pytest.mark.parametrize("cached", ["cache_latents", "cache_text_embeddings"])
def test_a_cache_that_cannot_be_written_is_named_in_one_sentence(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: str
) -> None:
    monkeypatch.setattr(tensor_file, "save_file", raising(SafetensorError("I/O error: No space left (os error 28)")))
    complaint = r"embedding_cache_dir='.*cache' cannot be written: No space left; give another folder"
    with pytest.raises(ConfigError, match=complaint):
        train(config.replace(embedding_cache_dir=str(tmp_path / "cache"), **{cached: True}))


def test_a_cache_that_cannot_be_written_is_found_before_the_model_is_loaded(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatlora_diffusion.training.trainer.prepare", raising(AssertionError("it was loaded")))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"embedding_cache_dir='.*' cannot be written: .+; give another folder"):
        train(config.replace(embedding_cache_dir=str(tmp_path / "file" / "cache"), cache_latents=True))


# What a run goes on with


def test_a_run_resumes_from_another_working_folder(
    config: TrainConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    config = config.replace(max_train_steps=2, checkpointing_steps=1)
    (planned,) = plan_runs(config, [parse_arm("lora")], [0], points=2)
    train(planned.config)
    monkeypatch.chdir(tmp_path)
    assert planned.is_finished, "comparing would train it anew"
    train(planned.config.replace(resume_from_checkpoint="checkpoint-1"))


def test_resume_refuses_another_base_of_the_same_name(config: TrainConfig, base: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(base, tmp_path / "mine" / base.name)
    shutil.copytree(base, tmp_path / "same" / "other-name")
    config = config.replace(pretrained_model_name_or_path=str(mine), max_train_steps=1, checkpointing_steps=1)
    train(config)
    resumed = config.replace(resume_from_checkpoint="latest")
    for part in ("unet", "vae"):
        (file,) = (mine / part).glob("*.safetensors")
        tensors = load_file(file)
        tensor_file.save_file({name: value + 0.1 for name, value in tensors.items()}, file, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=rf"checkpoint-1 was made on another base .* weights: .*{part[-3:]}"):
            train(resumed)
        tensor_file.save_file(tensors, file, metadata={"format": "pt"})
    train(resumed.replace(pretrained_model_name_or_path=str(tmp_path / "same" / "other-name")))


def test_resume_refuses_fewer_steps_and_another_number_of_processes(config: TrainConfig) -> None:
    train(config.replace(max_train_steps=2, checkpointing_steps=2))
    resumed = config.replace(resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match=r"max_train_steps=1 .* 2 .*checkpoint-2"):
        train(resumed.replace(max_train_steps=1))
    run = RunDir(Path(config.run.output_dir))
    text = run.events_file.read_text(encoding="utf-8")
    run.events_file.write_text(text.replace('"processes": 1', '"processes": 2'), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"checkpoint-2 was made by 2 process\(es\), but 1 "):
        train(resumed)


def test_a_resumed_run_s_settings_repeat_it_from_the_start(config: TrainConfig) -> None:
    train(config.replace(max_train_steps=2, checkpointing_steps=1))
    train(config.replace(max_train_steps=3, resume_from_checkpoint="checkpoint-1"))
    run = RunDir(Path(config.run.output_dir))
    assert run.config()["resume_from_checkpoint"] is None
    assert run.config()["max_train_steps"] == 3
