"""Runs on bases with other objectives: EDM, velocity, zero terminal SNR, and other losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny_runs import samples_of

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss
from flatlora_diffusion.families.sdxl.objective import SdxlObjective
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.micro_batches import micro_batches
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train


def test_each_setting_of_the_objective_changes_the_first_loss(config: TrainConfig) -> None:
    state = prepare(config.replace(prediction_type="v_prediction"), samples_of(config))
    losses = {}
    for settings in (
        {},
        {"do_edm_style_training": True},
        {"loss_type": "huber"},
        {"snr_gamma": 5.0},
        {"debiased_estimation": True},
        {"noise_offset": 0.1},
        {"multires_noise_iterations": 2},
        {"multires_noise_iterations": 2, "multires_noise_discount": 0.5},
        {"ip_noise_gamma": 0.1},
        {"min_timestep": 900},
        {"max_timestep": 100},
    ):
        objective = state.base.objective(config.replace(**settings).objective)
        with torch.no_grad():
            losses[str(settings)] = float(
                next(micro_batches(replace(state, objective=objective), 0, DrawHash())).loss()
            )
    assert len(set(losses.values())) == len(losses), losses


def test_a_base_with_an_edm_scheduler_is_trained_with_its_own_objective(
    config: TrainConfig, base: Path, tmp_path: Path
) -> None:
    from diffusers import EDMEulerScheduler

    folder = tmp_path / "edm"
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.scheduler = EDMEulerScheduler(sigma_data=0.5)
    pipeline.save_pretrained(folder)
    edm = config.replace(pretrained_model_name_or_path=str(folder), validation_prompt="x", num_validation_images=1)
    state = prepare(edm, samples_of(config))
    assert isinstance(state.objective, SdxlObjective)
    assert state.objective.edm
    path = train(edm.replace(validation_data_dir=config.data.instance_data_dir))
    losses = [event["loss"] for event in RunDir(path.parent).events() if event["event"] == "validation"]
    probe = fixed_probe(state.base, samples_of(config), 32, seed=0)
    assert losses[0] == pytest.approx(probe_loss(state.base.denoiser, state.objective, probe))
    with pytest.raises(ConfigError, match="--snr_gamma does not fit this base"):
        train(edm.replace(snr_gamma=5.0))
