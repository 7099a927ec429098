"""The objective against its closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from flatlora_diffusion.loss import Batch, diffusion_loss, draw_targets, sample_losses


def make_batch() -> Batch:
    rng = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 8, 8), (3, 77, 6), (3, 5), (3, 6))
    return Batch(*(torch.randn(shape, generator=rng) for shape in shapes))


class Recorder:
    """In place of a UNet: remembers what it was given and answers with a constant."""

    def __init__(self) -> None:
        self.given: Any = None

    def __call__(self, sample: Tensor, timesteps: Tensor, prompts: Tensor, **rest: Any) -> tuple[Tensor]:
        self.given = SimpleNamespace(sample=sample, timesteps=timesteps, prompts=prompts, **rest)
        return (torch.full_like(sample, 0.5),)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_squared_error_of_noise_or_velocity(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction)
    batch, unet = make_batch(), Recorder()
    noise, timesteps = draw_targets(scheduler, batch.latents, torch.Generator().manual_seed(1))
    loss = diffusion_loss(unet, scheduler, batch, noise, timesteps)
    alpha = scheduler.alphas_cumprod[timesteps].sqrt().view(3, 1, 1, 1)
    beta = (1 - scheduler.alphas_cumprod[timesteps]).sqrt().view(3, 1, 1, 1)
    torch.testing.assert_close(unet.given.sample, alpha * batch.latents + beta * noise)
    target = noise if prediction == "epsilon" else alpha * noise - beta * batch.latents
    torch.testing.assert_close(loss, (0.5 - target).square().mean())
    each = sample_losses(unet, scheduler, batch, noise, timesteps)
    torch.testing.assert_close(each, (0.5 - target).square().mean(dim=(1, 2, 3)))


def test_the_unet_is_given_prompt_pooled_prompt_and_sizes() -> None:
    batch, unet = make_batch(), Recorder()
    scheduler = DDPMScheduler()
    noise, timesteps = draw_targets(scheduler, batch.latents, torch.Generator().manual_seed(1))
    diffusion_loss(unet, scheduler, batch, noise, timesteps)
    assert torch.equal(unet.given.prompts, batch.prompt_embeds)
    assert torch.equal(unet.given.added_cond_kwargs["text_embeds"], batch.pooled_prompt_embeds)
    assert torch.equal(unet.given.added_cond_kwargs["time_ids"], batch.add_time_ids)
    assert torch.equal(unet.given.timesteps, timesteps)


def test_targets_are_standard_normal_and_uniform_in_time() -> None:
    latents = torch.zeros(2000, 1, 2, 2)
    noise, timesteps = draw_targets(DDPMScheduler(), latents, torch.Generator().manual_seed(2))
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert abs(float(timesteps.float().mean()) - 499.5) < 30


def test_an_unknown_prediction_type_is_refused() -> None:
    scheduler = DDPMScheduler(prediction_type="sample")
    batch = make_batch()
    noise, timesteps = draw_targets(scheduler, batch.latents, torch.Generator())
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        diffusion_loss(Recorder(), scheduler, batch, noise, timesteps)
