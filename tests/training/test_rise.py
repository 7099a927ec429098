"""--sigma_rise: the sigma at which eps makes the loss rise by a given share, found on the base itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import samples_of

from flatlora_diffusion.config import ConfigError, RunError, TrainConfig
from flatlora_diffusion.ground.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training import micro_batches
from flatlora_diffusion.training.beginning import first_weights as beginning
from flatlora_diffusion.training.beginning.first_weights import first_weights
from flatlora_diffusion.training.beginning.rise import MOST, sigma_at_rise
from flatlora_diffusion.training.micro_batches import first_micro_batches
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train

STEPS, RISE = 4, 0.001  # a base of random weights feels little


@pytest.fixture
def rising(config: TrainConfig) -> TrainConfig:
    return config.replace(method="flat-lora", sigma=None, sigma_rise=RISE, max_train_steps=STEPS, save_dtype="fp32")


@pytest.mark.parametrize("power", [1.6, 2.0, 2.5])
def test_the_sigma_is_found_where_the_rise_is_a_power_of_it(power: float) -> None:
    asked: list[float] = []

    def rise(sigma: float) -> float:
        asked.append(sigma)
        return math.inf if sigma > 1 else 0.3 * sigma**power

    sigma = sigma_at_rise(rise, 0.02, first=3.0)
    assert sigma is not None
    assert rise(sigma) == pytest.approx(0.02, rel=0.11)
    assert len(asked) < 8


@pytest.mark.parametrize("rise", [0.0, -0.01, 1e-9])
def test_a_loss_that_does_not_rise_has_no_sigma(rise: float) -> None:
    assert sigma_at_rise(lambda sigma: rise, 0.02, first=0.1) is None


def test_the_loss_of_the_first_steps_rises_as_was_asked_for(rising: TrainConfig) -> None:
    state = prepare(rising, samples_of(rising))
    before = {name: one.detach().clone() for name, one in state.trainable.items()}
    first_weights(state)
    sigma = state.config.perturb.sigma
    assert sigma is not None
    assert 0 < sigma < MOST
    assert state.flats[0].sigma_at(STEPS) == pytest.approx(sigma), "the steps are taken with it"
    assert mean_loss(state, sigma) / mean_loss(state, 0) - 1 == pytest.approx(RISE, rel=0.11)
    assert all(torch.equal(one, before[name]) for name, one in state.trainable.items())
    assert all(one.grad is None for one in state.trainable.values())


def mean_loss(state: TrainState, sigma: float) -> float:
    losses = []
    for one in first_micro_batches(state, STEPS):
        with torch.no_grad(), state.flats[0].perturb(one.step, one.slot, sigma=sigma):
            losses.append(one.loss())
    return float(torch.stack(losses).mean())


def test_a_run_is_the_one_with_the_sigma_that_it_found(rising: TrainConfig, tmp_path: Path) -> None:
    found = train(rising.replace(output_dir=str(tmp_path / "found"), seed=3))
    sigma = json.loads((tmp_path / "found" / "config.json").read_text(encoding="utf-8"))["sigma"]
    given = rising.replace(output_dir=str(tmp_path / "given"), seed=3, sigma=sigma, sigma_rise=None)
    one, other = (load_file(path) for path in (found, train(given)))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_resumed_run_goes_on_with_the_sigma_that_it_began_with(
    rising: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rising.replace(output_dir=str(tmp_path / "run"), checkpointing_steps=2, seed=3)
    train(run)
    whole = load_file(tmp_path / "run" / LORA_FILE)
    sigma = RunDir(tmp_path / "run").config()["sigma"]
    monkeypatch.setattr(beginning, "start_at_rise", lambda state: pytest.fail("it was looked for again"))
    (tmp_path / "run" / LORA_FILE).unlink()
    train(run.replace(resume_from_checkpoint="checkpoint-2"))
    again = load_file(tmp_path / "run" / LORA_FILE)
    assert all(torch.equal(one, again[name]) for name, one in whole.items())
    assert RunDir(tmp_path / "run").config()["sigma"] == sigma


def test_a_given_sigma_is_not_looked_for(rising: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginning, "start_at_rise", lambda state: pytest.fail("it was looked for"))
    state = prepare(rising.replace(sigma=0.3), samples_of(rising))
    first_weights(state)
    assert state.config.perturb.sigma == 0.3


def test_a_base_that_feels_no_sigma_is_told_of(rising: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmoved(*anything: Any) -> torch.Tensor:
        return torch.ones(())

    state = prepare(rising, samples_of(rising))
    monkeypatch.setattr(micro_batches, "diffusion_loss", unmoved)
    with pytest.raises(RunError, match=r"sigma_rise=0.001 was asked for, but no sigma up to 4 .* give a smaller"):
        first_weights(state)


@pytest.mark.parametrize("method", ["lora", "factor-noise", "sam"])
def test_methods_without_noise_in_the_weights_have_no_rise(method: str) -> None:
    with pytest.raises(ConfigError, match=f"--method {method} has no sigma_rise"):
        TrainConfig.from_dict({"method": method, "sigma_rise": 0.02})
