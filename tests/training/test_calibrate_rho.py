"""--rho_rise: the rho at which SAM's perturbation increases the loss by a share, calibrated on the base itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import samples_of

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.config import ConfigError, RunError, TrainConfig
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training import first_gradients, micro_batches
from flatlora_diffusion.training.first_gradients import start_from_gradients
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train

STEPS, CLIMB = 4, 0.005  # a base of random weights has small gradients


@pytest.fixture
def climbing(config: TrainConfig) -> TrainConfig:
    return config.replace(method="sam", rho_rise=CLIMB, max_train_steps=STEPS, save_dtype="fp32")


def test_the_calibrated_rho_raises_the_loss_as_requested(climbing: TrainConfig) -> None:
    climbing = climbing.replace(gradient_accumulation_steps=2)
    state = prepare(climbing, samples_of(climbing))
    before = {name: parameter.detach().clone() for name, parameter in state.trainable.items()}
    start_from_gradients(state)
    rho = state.config.perturb.rho
    assert rho is not None
    assert rho == state.config.perturb.effective_rho > 0, "the steps are taken with it"
    assert all(torch.equal(parameter, before[name]) for name, parameter in state.trainable.items())
    assert all(parameter.grad is None for parameter in state.trainable.values())
    assert ascended(state, rho) / ascended(state, 0) - 1 == pytest.approx(CLIMB, rel=0.15), "the rest is curvature"


def ascended(state: TrainState, rho: float) -> float:
    """The mean loss of the first steps at W + rho g / ||g||, computed by moving W by hand."""
    weights = {layer: layer.get_base_layer().weight for layer in lora_layers(state.model).values()}
    losses = []
    for step in range(STEPS):
        drawn = list(micro_batches.micro_batches(state, step, DrawHash()))
        for weight in weights.values():
            weight.requires_grad_(True)
        slopes = torch.autograd.grad(torch.stack([batch.loss() for batch in drawn]).mean(), list(weights.values()))
        length = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
        with torch.no_grad():
            originals = [weight.clone() for weight in weights.values()]
            for weight, slope in zip(weights.values(), slopes, strict=True):
                weight.requires_grad_(False).add_(slope, alpha=rho / length)
            losses += [batch.loss() for batch in drawn]
            for weight, value in zip(weights.values(), originals, strict=True):
                weight.copy_(value)
    return float(torch.stack(losses).mean())


def test_a_calibrated_run_equals_one_with_that_rho(climbing: TrainConfig, tmp_path: Path) -> None:
    calibrated = train(climbing.replace(output_dir=str(tmp_path / "found"), seed=3))
    rho = RunDir(tmp_path / "found").config()["rho"]
    given = climbing.replace(output_dir=str(tmp_path / "given"), seed=3, rho=rho, rho_rise=None)
    first, second = (load_file(path) for path in (calibrated, train(given)))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_a_resumed_run_keeps_its_rho(climbing: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = climbing.replace(output_dir=str(tmp_path / "run"), checkpointing_steps=2, seed=3)
    train(run)
    whole = load_file(tmp_path / "run" / LORA_FILE)
    rho = RunDir(tmp_path / "run").config()["rho"]
    monkeypatch.setattr(first_gradients, "calibrate", lambda state: pytest.fail("it was calibrated again"))
    (tmp_path / "run" / LORA_FILE).unlink()
    train(run.replace(resume_from_checkpoint="checkpoint-2"))
    again = load_file(tmp_path / "run" / LORA_FILE)
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
    assert RunDir(tmp_path / "run").config()["rho"] == rho


def test_a_given_rho_is_not_calibrated(climbing: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_gradients, "calibrate", lambda state: pytest.fail("it was calibrated"))
    state = prepare(climbing.replace(rho=0.3), samples_of(climbing))
    start_from_gradients(state)
    assert state.config.perturb.rho == 0.3


def test_a_base_without_a_gradient_is_an_error(climbing: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    state = prepare(climbing, samples_of(climbing))
    monkeypatch.setattr(first_gradients.Sketches, "norm", lambda slopes: torch.zeros(()))
    with pytest.raises(RunError, match=r"rho_rise=0.005"):
        start_from_gradients(state)


def test_steps_whose_gradients_overflow_are_left_out(climbing: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    state, measurements = (
        prepare(climbing, samples_of(climbing)),
        [(7.0, math.inf), (2.0, 4.0), (7.0, math.nan), (4.0, 2.0)],
    )
    monkeypatch.setattr(first_gradients, "_loss_and_gradient_norm", lambda state, reader, step: measurements[step])
    start_from_gradients(state)
    assert state.config.perturb.rho == pytest.approx(CLIMB * (2 + 4) / (4 + 2))


def test_the_fp16_loss_scale_is_divided_out(climbing: TrainConfig) -> None:
    usual, scaled = (prepare(climbing, samples_of(climbing)) for _ in range(2))
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for state in (usual, scaled):
        start_from_gradients(state)
    assert usual.config.perturb.rho is not None
    assert scaled.config.perturb.rho == pytest.approx(usual.config.perturb.rho, rel=0.01)


def test_a_first_gradient_that_overflows_in_fp16_is_taken_at_a_lower_scale(
    climbing: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowered loss scale is not kept: the run equals a run with this rho in its settings."""
    usual = prepare(climbing, samples_of(climbing))
    start_from_gradients(usual)
    overflow_above(2.0**12, monkeypatch)
    state = prepare(climbing, samples_of(climbing))
    state.accelerator.scaler = scaler = torch.amp.GradScaler("cpu")
    began = scaler.get_scale()
    start_from_gradients(state)
    assert state.config.perturb.rho == pytest.approx(usual.config.perturb.rho, rel=0.01)
    assert scaler.get_scale() == began == 2.0**16
    assert all(parameter.grad is None for parameter in state.trainable.values())


def test_gradients_that_overflow_at_any_scale_have_no_rho(
    climbing: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow_above(0.5, monkeypatch)
    state = prepare(climbing, samples_of(climbing))
    state.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(RunError, match=r"rho_rise=0.005"):
        start_from_gradients(state)


def test_lora_ga_starts_where_it_does_without_fp16_when_the_first_gradient_overflows(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(method="lora", adapter="lora-ga", lora_ga_steps=2)
    usual = prepare(config, samples_of(config))
    start_from_gradients(usual)
    overflow_above(2.0**12, monkeypatch)
    state = prepare(config, samples_of(config))
    state.accelerator.scaler = scaler = torch.amp.GradScaler("cpu")
    start_from_gradients(state)
    assert scaler.get_scale() == 2.0**16
    for name, weight in state.trainable.items():
        torch.testing.assert_close(weight, usual.trainable[name], rtol=1e-3, atol=1e-5)


def overflow_above(most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gradients overflow, as in fp16, at loss scales above `most`."""
    plain = micro_batches.diffusion_loss

    def overflowing(*given: Any) -> torch.Tensor:
        loss = plain(*given)
        loss.register_hook(lambda slope: slope.fill_(math.inf) if float(slope) > most else slope)
        return loss

    monkeypatch.setattr(micro_batches, "diffusion_loss", overflowing)


@pytest.mark.parametrize("method", ["lora", "lora-sam", "bi-lora", "flat-lora"])
def test_methods_that_do_not_ascend_in_w_have_no_rise_of_rho(method: str) -> None:
    with pytest.raises(ConfigError, match=f"--method {method} has no rho_rise"):
        TrainConfig.from_dict({"method": method, "rho_rise": 0.2})
