"""The micro-batches of a step, with noise and timesteps drawn by (seed, purpose, step, slot), and their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flatlora_diffusion.adapter.layers import base_alone
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.objective import diffusion_loss, predict
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.training.state import TrainState, seeded_dropout


@dataclass(frozen=True)
class SampledMicroBatch:
    """A micro-batch of a step with its noise and timesteps, which are the same in each pass through the model."""

    state: TrainState
    step: int
    slot: int
    loss: Callable[[], Tensor]
    is_last: bool

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        """Accumulate `weight` times the gradient of the loss in the parameters, and return the loss.

        With `is_shared` the last micro-batch of a step averages the gradients over processes.
        """
        state = self.state
        sync = nullcontext() if self.is_last and is_shared else state.accelerator.no_sync(state.model)
        with sync, seeded_dropout(state, self.step, self.slot):
            loss = self.loss()
            penalty = state.penalty()
            objective = loss if penalty is None else loss + penalty
            state.accelerator.backward(objective * weight / state.config.optim.gradient_accumulation_steps)
        return loss.detach()


def micro_batches(state: TrainState, step: int, draws: DrawHash) -> Iterator[SampledMicroBatch]:
    """The micro-batches of this process in optimizer step `step`, from 0; `draws` hashes what they draw."""
    accelerator, accumulation = state.accelerator, state.config.optim.gradient_accumulation_steps
    for micro in range(accumulation):
        slot = micro * accelerator.num_processes + accelerator.process_index
        batch = state.batches.batch(step, slot)
        rng = generator(batch.latents.device, state.batches.seed, "diffusion", step, slot)
        noise, timesteps = state.objective.draw(batch.latents, rng)
        batch = state.objective.with_input_perturbation(batch, rng)
        draws.add(batch.latents, *batch.geometry.values(), noise, timesteps)
        yield SampledMicroBatch(
            state, step, slot, partial(_loss, state, batch, noise, timesteps), is_last=micro + 1 == accumulation
        )


def _loss(state: TrainState, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    loss = diffusion_loss(state.model, state.objective, batch, noise, timesteps)
    if state.config.objective.prior_from_base:
        loss = loss + prior_loss(state, state.batches.with_class_prompt(batch), noise, timesteps)
    return loss


def prior_loss(state: TrainState, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The loss of W' + eps against the prediction of the base: prior preservation without class images.

    The prompts of `batch` are class prompts, without the trigger.
    """
    model, objective = state.model, state.objective
    # The target is without eps: otherwise the LoRA would preserve a perturbed base.
    with torch.no_grad(), base_alone(model, state.flats):
        target = predict(model, objective, batch, noise, timesteps)
    return diffusion_loss(model, objective, batch, noise, timesteps, target)
