"""The training objective against closed forms."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from torch import Tensor, nn

from flatlora_diffusion.config import ConfigError, ObjectiveConfig, TrainConfig
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.objective import diffusion_loss, sample_losses
from flatlora_diffusion.families.sdxl.objective import SdxlObjective, objective_of


def make_batch() -> Batch:
    rng = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 8, 8), (3, 77, 6), (3, 5), (3, 6))
    latents, embeds, pooled, ids = (torch.randn(shape, generator=rng) for shape in shapes)
    return Batch(latents, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, {"add_time_ids": ids})


class Recorder(nn.Module):
    """In place of a UNet: remembers what it was given and answers with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Any = None

    def forward(self, sample: Tensor, timesteps: Tensor, prompts: Tensor, **rest: Any) -> tuple[Tensor]:
        self.given = SimpleNamespace(sample=sample, timesteps=timesteps, prompts=prompts, **rest)
        return (torch.full_like(sample, 0.5),)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_squared_error_of_noise_or_velocity(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction)
    batch, unet = make_batch(), Recorder()
    noise, timesteps = SdxlObjective(scheduler).draw(batch.latents, torch.Generator().manual_seed(1))
    loss = diffusion_loss(unet, SdxlObjective(scheduler), batch, noise, timesteps)
    alpha = scheduler.alphas_cumprod[timesteps].sqrt().view(3, 1, 1, 1)
    beta = (1 - scheduler.alphas_cumprod[timesteps]).sqrt().view(3, 1, 1, 1)
    torch.testing.assert_close(unet.given.sample, alpha * batch.latents + beta * noise)
    target = noise if prediction == "epsilon" else alpha * noise - beta * batch.latents
    torch.testing.assert_close(loss, (0.5 - target).square().mean())
    each = sample_losses(unet, SdxlObjective(scheduler), batch, noise, timesteps)
    torch.testing.assert_close(each, (0.5 - target).square().mean(dim=(1, 2, 3)))


def test_the_unet_is_given_prompt_pooled_prompt_and_sizes() -> None:
    batch, unet = make_batch(), Recorder()
    scheduler = DDPMScheduler()
    noise, timesteps = SdxlObjective(scheduler).draw(batch.latents, torch.Generator().manual_seed(1))
    diffusion_loss(unet, SdxlObjective(scheduler), batch, noise, timesteps)
    assert torch.equal(unet.given.prompts, batch.prompts["prompt_embeds"])
    assert torch.equal(unet.given.added_cond_kwargs["text_embeds"], batch.prompts["pooled_prompt_embeds"])
    assert torch.equal(unet.given.added_cond_kwargs["time_ids"], batch.geometry["add_time_ids"])
    assert torch.equal(unet.given.timesteps, timesteps)


def test_targets_are_standard_normal_and_uniform_in_time() -> None:
    latents = torch.zeros(2000, 1, 2, 2)
    noise, timesteps = SdxlObjective(DDPMScheduler()).draw(latents, torch.Generator().manual_seed(2))
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert abs(float(timesteps.float().mean()) - 499.5) < 30


def test_an_unknown_prediction_type_is_refused() -> None:
    scheduler = DDPMScheduler(prediction_type="sample")
    batch = make_batch()
    noise, timesteps = SdxlObjective(scheduler).draw(batch.latents, torch.Generator())
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        diffusion_loss(Recorder(), SdxlObjective(scheduler), batch, noise, timesteps)


def drawn(scheduler: Any, batch: Batch, **settings: Any) -> tuple[SdxlObjective, Tensor, Tensor]:
    objective = SdxlObjective(scheduler, **settings)
    return objective, *objective.draw(batch.latents, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_each_image_by_its_own_timestep(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction)
    batch = make_batch()
    objective, noise, timesteps = drawn(scheduler, batch, snr_gamma=5.0)
    plain = sample_losses(Recorder(), SdxlObjective(scheduler), batch, noise, timesteps)
    signal = scheduler.alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    expected = plain * snr.clamp(max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(sample_losses(Recorder(), objective, batch, noise, timesteps), expected)
    assert not torch.allclose(expected, plain)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_debiased_estimation_weights_each_image_by_its_own_timestep(prediction: str) -> None:
    scheduler, batch = DDPMScheduler(prediction_type=prediction), make_batch()
    noise, timesteps = torch.randn(batch.latents.shape), torch.tensor([0, 300, 999])
    objective = objective_of(ObjectiveConfig(debiased_estimation=True), scheduler)
    plain = sample_losses(Recorder(), SdxlObjective(scheduler), batch, noise, timesteps)
    signal = scheduler.alphas_cumprod[timesteps].double()
    snr = signal / (1 - signal)
    assert snr[0] > 1000, "what is clamped"
    snr = snr.clamp(max=1000)
    weights = snr**-0.5 if prediction == "epsilon" else 1 / (snr + 1)
    weighted = sample_losses(Recorder(), objective, batch, noise, timesteps)
    torch.testing.assert_close(weighted, (plain * weights).float())


def test_debiased_estimation_is_no_second_weighting() -> None:
    for others in ({"snr_gamma": 5.0}, {"do_edm_style_training": True}):
        with pytest.raises(ConfigError, match="|".join(f"--debiased_estimation.*--{name}" for name in others)):
            TrainConfig.from_dict({"debiased_estimation": True, **others})
    with pytest.raises(ConfigError, match="--debiased_estimation does not fit this base"):
        objective_of(ObjectiveConfig(debiased_estimation=True), EDMEulerScheduler())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_style_is_the_same_denoising_problem_in_other_units(prediction: str) -> None:
    """x_0-errors over sigma^2 are noise errors, and velocity errors over 1 - alpha: exactly."""
    scheduler = DDPMScheduler(prediction_type=prediction)
    batch = make_batch()
    objective, noise, timesteps = drawn(scheduler, batch, edm=True)
    plain_model, edm_model = Recorder(), Recorder()
    plain = sample_losses(plain_model, SdxlObjective(scheduler), batch, noise, timesteps)
    edm = sample_losses(edm_model, objective, batch, noise, timesteps)
    torch.testing.assert_close(edm_model.given.sample, plain_model.given.sample)
    signal = scheduler.alphas_cumprod[timesteps]
    factor = torch.ones(3) if prediction == "epsilon" else signal
    torch.testing.assert_close(edm, plain * factor, rtol=1e-4, atol=1e-5)


def test_an_edm_scheduler_brings_its_own_preconditioning() -> None:
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    batch, model = make_batch(), Recorder()
    objective, noise, timesteps = drawn(scheduler, batch, edm=True)
    losses = sample_losses(model, objective, batch, noise, timesteps)
    sigma = scheduler.sigmas[timesteps].view(3, 1, 1, 1)
    noisy = batch.latents + sigma * noise
    torch.testing.assert_close(model.given.sample, noisy / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(model.given.timesteps, sigma.flatten().log() / 4)
    denoised = noisy * 0.25 / (sigma**2 + 0.25) + 0.5 * sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = (weight * (denoised - batch.latents).square()).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected)


def test_huber_counts_small_errors_squared_and_large_ones_linearly() -> None:
    batch, model = make_batch(), Recorder()
    objective, noise, timesteps = drawn(DDPMScheduler(), batch, loss_type="huber")
    small = torch.full_like(noise, 0.5 + 0.01)
    large = torch.full_like(noise, 0.5 + 10.0)
    losses = [sample_losses(model, objective, batch, one, timesteps) for one in (small, large)]
    torch.testing.assert_close(losses[0], torch.full((3,), 0.01**2), rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[1], torch.full((3,), 2 * 0.1 * (10.0 - 0.05)))


def test_weights_and_masks_choose_what_counts() -> None:
    batch, model = make_batch(), Recorder()
    objective, noise, timesteps = drawn(DDPMScheduler(), batch)
    each = sample_losses(model, objective, batch, noise, timesteps)
    weighted = replace(batch, weights=torch.tensor([2.0, 0.0, 0.5]))
    torch.testing.assert_close(
        diffusion_loss(model, objective, weighted, noise, timesteps), (2 * each[0] + 0.5 * each[2]) / 3
    )
    mask = torch.zeros(3, 1, 8, 8)
    mask[:, :, 2:5] = 1
    masked = sample_losses(model, objective, replace(batch, mask=mask), noise, timesteps)
    torch.testing.assert_close(masked, (0.5 - noise[:, :, 2:5]).square().mean(dim=(1, 2, 3)))
    empty = sample_losses(model, objective, replace(batch, mask=torch.zeros(3, 1, 8, 8)), noise, timesteps)
    assert empty.tolist() == [0, 0, 0]


def test_noise_offset_shifts_whole_channels_and_no_other_draw() -> None:
    batch = make_batch()
    _, plain, steps = drawn(DDPMScheduler(), batch)
    _, shifted, same_steps = drawn(DDPMScheduler(), batch, noise_offset=0.1)
    assert torch.equal(steps, same_steps)
    difference = shifted - plain
    spread = difference.amax(dim=(2, 3)) - difference.amin(dim=(2, 3))
    assert float(spread.max()) < 1e-6
    assert 0.05 < float(difference.mean(dim=(2, 3)).std()) < 0.2


def test_timesteps_stay_between_those_that_are_given() -> None:
    scheduler, latents = DDPMScheduler(), torch.zeros(4000, 1, 1, 1)
    config = ObjectiveConfig(min_timestep=200, max_timestep=203)
    _, timesteps = objective_of(config, scheduler).draw(latents, torch.Generator().manual_seed(0))
    assert set(timesteps.tolist()) == {200, 201, 202, 203}
    for least, most in ((5, 4), (0, 1000), (1000, 999)):
        with pytest.raises(ConfigError, match=r"leave no timestep: .* at most 999"):
            objective_of(ObjectiveConfig(min_timestep=least, max_timestep=most), scheduler)


def test_without_bounds_the_draws_are_what_they_were() -> None:
    latents = torch.zeros(8, 4, 2, 2)
    drawn = [
        one.draw(latents, torch.Generator().manual_seed(5))
        for one in (objective_of(ObjectiveConfig(), DDPMScheduler()), SdxlObjective(DDPMScheduler()))
    ]
    rng = torch.Generator().manual_seed(5)
    torch.randn(latents.shape, generator=rng)
    expected = torch.randint(0, 1000, (8,), generator=rng)
    assert all(torch.equal(timesteps, expected) for _, timesteps in drawn)


def test_multires_noise_keeps_its_std_and_has_more_in_large_shapes() -> None:
    latents = torch.zeros(64, 4, 32, 32)
    noises = []
    for iterations in (0, 6):
        config = ObjectiveConfig(multires_noise_iterations=iterations, multires_noise_discount=0.8)
        noise, _ = objective_of(config, DDPMScheduler()).draw(latents, torch.Generator().manual_seed(0))
        noises.append(noise)
    plain, coarse = noises
    torch.testing.assert_close(coarse.std(dim=(1, 2, 3)), torch.ones(64))
    means = [torch.nn.functional.avg_pool2d(noise, 16).var() for noise in noises]
    assert means[0] == pytest.approx(1 / 256, rel=0.2), "the mean of 256 independent pixels"
    assert means[1] > 20 * means[0]
    assert not torch.equal(plain, coarse)


def test_more_noise_is_seen_and_not_predicted() -> None:
    scheduler, batch = DDPMScheduler(), make_batch()
    objective = objective_of(ObjectiveConfig(ip_noise_gamma=0.1), scheduler)
    noise, timesteps = objective.draw(batch.latents, torch.Generator().manual_seed(0))
    noisier = objective.with_input_perturbation(batch, torch.Generator().manual_seed(1))
    drawn = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    model = Recorder()
    losses = sample_losses(model, objective, noisier, noise, timesteps)
    torch.testing.assert_close(model.given.sample, scheduler.add_noise(batch.latents, noise + 0.1 * drawn, timesteps))
    torch.testing.assert_close(losses, (0.5 - noise).square().mean(dim=(1, 2, 3)))
    assert SdxlObjective(scheduler).with_input_perturbation(batch, torch.Generator()) is batch
