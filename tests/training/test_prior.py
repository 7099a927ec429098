"""--prior_from_base: prior preservation by the base's own prediction without the trigger."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tiny_runs import samples_of
from torch import Tensor

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.objective import diffusion_loss
from flatlora_diffusion.families.sdxl.pipeline import Sdxl
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.training.micro_batches import prior_loss
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return config.replace(prior_from_base=True, class_prompt="a thing", prior_loss_weight=0.5)


def drawn(state: TrainState) -> tuple[Batch, Tensor, Tensor]:
    """The first micro-batch with the trainer's draws."""
    batch = state.batches.batch(0, 0)
    rng = generator(batch.latents.device, state.batches.seed, "diffusion", 0, 0)
    return batch, *state.objective.draw(batch.latents, rng)


def prior_of(state: TrainState, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    return prior_loss(state, state.batches.with_class_prompt(batch), noise, timesteps)


@torch.no_grad()
def move_lora(state: TrainState) -> None:
    rng = torch.Generator().manual_seed(0)
    for name, weight in state.trainable.items():
        if "lora_B" in name:
            weight.copy_(0.3 * torch.randn(weight.shape, generator=rng))


def asked_by_hand(sdxl: Any, unet: Any, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    prompts, pooled = (part.expand(len(noise), *part.shape[1:]) for part in sdxl.encode_prompts(["a thing"]).values())
    noisy = sdxl.scheduler.add_noise(batch.latents, noise, timesteps)
    added = {"text_embeds": pooled, "time_ids": batch.geometry["add_time_ids"]}
    output: Tensor = unet(noisy, timesteps, prompts, added_cond_kwargs=added).sample
    return output


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True}, {"shuffle_tags": True}])
def test_an_untrained_lora_has_no_prior_loss(config: TrainConfig, changes: dict[str, Any]) -> None:
    state = prepare(config.replace(**changes), samples_of(config))
    loss = prior_of(state, *drawn(state))
    assert loss.item() == 0
    loss.backward()
    gradients = [weight.grad for weight in state.trainable.values()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_it_is_the_squared_error_to_the_base_without_lora_and_without_eps(
    config: TrainConfig, sdxl: Sdxl, sigma: float
) -> None:
    state = prepare(config, samples_of(config))
    move_lora(state)
    draws = drawn(state)
    with torch.no_grad(), ExitStack() as stack:
        for flat in state.flats:
            stack.enter_context(flat.perturb(0, 0, sigma=sigma))
        loss = prior_of(state, *draws)
        mine = asked_by_hand(sdxl, state.base.denoiser, *draws)
    with torch.no_grad():
        of_base = asked_by_hand(sdxl, sdxl.denoiser, *draws)
    torch.testing.assert_close(loss, 0.5 * (mine - of_base).square().mean())
    assert float(loss) > 1e-4


def test_trained_text_encoders_are_held_to_what_they_were(config: TrainConfig, sdxl: Sdxl) -> None:
    state = prepare(config.replace(train_text_encoder=True), samples_of(config))
    move_lora(state)
    draws = drawn(state)
    with torch.no_grad():
        loss = prior_of(state, *draws)
        mine = asked_by_hand(state.base, state.base.denoiser, *draws)
        of_base = asked_by_hand(sdxl, sdxl.denoiser, *draws)
    torch.testing.assert_close(loss, 0.5 * (mine - of_base).square().mean())


def test_a_step_adds_the_prior_loss_and_trains_the_same_parameters(config: TrainConfig) -> None:
    state = prepare(config.replace(method="lora", gradient_checkpointing=True), samples_of(config))
    move_lora(state)
    draws = drawn(state)
    with torch.no_grad():
        plain, prior = diffusion_loss(state.model, state.objective, *draws), prior_of(state, *draws)
    before = {name: weight.detach().clone() for name, weight in state.trainable.items()}
    assert train_step(state, 0) == pytest.approx(float(plain + prior))
    assert float(prior) > 0
    assert all(not torch.equal(before[name], weight) for name, weight in state.trainable.items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class_prompt": None}, "--prior_from_base needs --class_prompt"),
        ({"with_prior_preservation": True, "class_data_dir": "x"}, "--prior_from_base.*--with_prior_preservation"),
        ({"instance_prompt": "a thing"}, "--instance_prompt.*a thing"),
        ({"class_prompt": "a TOK", "train_text_encoder_ti": True}, r"--token_abstraction \(TOK\)"),
    ],
)
def test_incompatible_settings_are_refused(config: TrainConfig, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config.replace(**changes)
