"""Whole trainings in fp16 as on a GPU without bf16: precisions, overflows of the loss scale, and resumption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from fp16_on_cpu import FIRST_SCALE, init_with_scaler
from safetensors.torch import load_file

from flatlora_diffusion.config import RunError, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train, train_step


@pytest.fixture
def half(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run in fp16 with the settings of `evidence` on a T4, on a CPU whose accelerate scales losses."""
    monkeypatch.setattr(Accelerator, "__init__", init_with_scaler)
    return config.replace(mixed_precision="fp16", cache_latents=True, gradient_checkpointing=True, offload=True)


def steps_of(config: TrainConfig) -> list[dict[str, Any]]:
    return RunDir(Path(config.run.output_dir)).steps()


def weights_of(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.output_dir) / LORA_FILE)


def test_the_base_is_in_fp16_and_vae_lora_and_gradients_in_fp32(half: TrainConfig) -> None:
    state = prepare(half, load_samples(Path(str(half.data.instance_data_dir))).samples)
    pipeline = state.base.pipeline
    frozen = [weight for weight in pipeline.unet.parameters() if not weight.requires_grad]
    encoders = [*pipeline.text_encoder.parameters(), *pipeline.text_encoder_2.parameters()]
    assert {weight.dtype for weight in (*frozen, *encoders)} == {torch.float16}
    assert {weight.dtype for weight in pipeline.vae.parameters()} == {torch.float32}
    kinds: list[torch.dtype] = []
    pipeline.unet.mid_block.register_forward_hook(lambda _, given, made: kinds.append(made.dtype))
    for name, weight in state.trainable.items():
        assert weight.dtype == torch.float32, name
        weight.register_hook(lambda gradient: kinds.append(gradient.dtype))
    train_step(state, 0)
    assert set(kinds) == {torch.float16, torch.float32}
    assert state.progress.loss_scale == 2.0**16
    assert all(weight.isfinite().all() for weight in state.trainable.values())


@pytest.mark.parametrize("method", ["lora", "flat-lora", "sam"])
def test_the_losses_are_those_of_fp32(half: TrainConfig, tmp_path: Path, method: str) -> None:
    runs = [
        half.replace(method=method, mixed_precision=precision, output_dir=str(tmp_path / precision))
        for precision in ("fp16", "no")
    ]
    for run in runs:
        train(run)
    in_half, full = ([event["loss"] for event in steps_of(run)] for run in runs)
    assert in_half != full
    assert in_half == pytest.approx(full, rel=0.01)


@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
def test_a_run_leaves_out_the_steps_that_overflow_and_resumes_bit_for_bit(
    half: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FIRST_SCALE, str(2.0**25))
    run = half.replace(max_train_steps=6, checkpointing_steps=1)
    train(run)
    whole, steps = weights_of(run), steps_of(run)
    skipped = [event["is_skipped"] for event in steps]
    assert [event["loss_scale"] for event in steps] == [2.0 ** (25 - sum(skipped[:step])) for step in range(6)]
    assert skipped[0]
    done = skipped.index(False) + 1
    for step in (1, done):  # before and after the first step that is not left out
        copy = run.replace(output_dir=str(tmp_path / f"from-{step}"))
        shutil.copytree(run.run.output_dir, copy.run.output_dir)
        train(copy.replace(resume_from_checkpoint=f"checkpoint-{step}", seed=None))
        assert [event["loss_scale"] for event in steps_of(copy)] == [event["loss_scale"] for event in steps]
        for name, weight in weights_of(copy).items():
            assert torch.equal(weight, whole[name]), name


def test_a_run_whose_steps_all_overflow_says_so_and_resumes_at_its_lower_scale(
    half: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FIRST_SCALE, str(2.0**26))
    with pytest.raises(RunError, match=r"last 2 steps overflow in fp16.*checkpoint-2"):
        train(half.replace(max_train_steps=2))
    train(half.replace(max_train_steps=12, resume_from_checkpoint="latest"))
    assert steps_of(half)[2]["loss_scale"] == 2.0**24
    assert any(weight.any() for weight in weights_of(half).values())
