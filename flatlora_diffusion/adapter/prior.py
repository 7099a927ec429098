"""Class preservation without class images: the LoRA is held to what the base itself predicts without the trigger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.method.perturbation import FlatLora
from flatlora_diffusion.sdxl.objective import Batch, Objective, diffusion_loss, predicted


def prior_loss(
    model: nn.Module, flats: Sequence[FlatLora], objective: Objective, batch: Batch, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """The loss of `model` on `batch`, whose prompts are without the trigger, to the base's own prediction there."""
    with torch.no_grad(), _base_alone(model, flats):
        target = predicted(model, objective, batch, noise, timesteps)
    return diffusion_loss(model, objective, batch, noise, timesteps, target)


@contextmanager
def _base_alone(model: nn.Module, flats: Sequence[FlatLora]) -> Iterator[None]:
    """No LoRA and no eps: W' + eps is held to W, for with eps on both sides what is kept would be another base."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    with ExitStack() as stack:
        for flat in flats:
            stack.enter_context(flat.disabled())
        for layer in layers:
            layer.enable_adapters(False)
            stack.callback(layer.enable_adapters, True)
        yield
