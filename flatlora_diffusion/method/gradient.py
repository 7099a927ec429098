"""How the gradient of an optimizer step is taken: the seam between a training loop and the methods.

The loop draws the micro-batches and moves the weights; a method decides where on the loss their gradients are taken,
and in how many passes. LoRA's and Flat-LoRA's are here: at the weights, and at W + eps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flatlora_diffusion.config import PerturbConfig, PerturbPer
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.noise_config import NoiseConfig


class MicroBatch(Protocol):
    """One micro-batch with all that is drawn for it, so that each pass through the model sees the same."""

    @property
    def slot(self) -> int:
        """micro_batch * world_size + rank."""

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        """The loss, detached, after `weight` times its gradient was added to those of the parameters.

        With `is_shared` processes share what they have of the step once its last micro-batch is done.
        """


@dataclass(frozen=True)
class Ascent:
    """Where a step's gradient was taken: the micro-batches' losses there, and `climb`, how far above those at the
    weights they are to first order, rho ||g||, with the factor that fp16 has the loss times.
    """

    losses: list[Tensor]
    climb: Tensor


@dataclass(frozen=True)
class GradientInputs:
    """What a method's gradient is built from.

    Attributes:
        models: the adapted models by the prefix of their draws.
        trainable: all trained parameters by name.
        config: the method's settings.
        seed: seed of all draws that have no seed of their own.
        total_steps: optimizer steps of the run.
    """

    models: Mapping[str, nn.Module]
    trainable: Mapping[str, nn.Parameter]
    config: PerturbConfig
    seed: int
    total_steps: int

    @property
    def factors(self) -> list[nn.Parameter]:
        """A, B and AdaLoRA's E."""
        return [value for name, value in self.trainable.items() if any(f".lora_{side}." in name for side in "ABE")]


class StepGradient:
    """The gradient at the weights as they are: plain LoRA."""

    flats: Sequence[FlatLora] = ()
    ascends = False  # whether the gradient is taken where the loss is higher
    ascent: Ascent | None = None
    """That of the last step, where the method ascends and could."""

    def sigma_at(self, step: int) -> float:
        """The relative radius of the noise in optimizer step `step`, 0 without any."""
        return self.flats[0].sigma_at(step) if self.flats else 0.0

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        """Add the gradient of optimizer step `step` to the trained parameters' own; returns the micro-batches' losses.

        The weights are afterwards what they were.
        """
        return [batch.backward() for batch in micro_batches]

    def before_update(self, step: int, learning_rate: float) -> None:
        """Do to the weights what the method does just before the optimizer's step, its gradients being complete."""

    def weights_moved(self, learning_rate: float, loss_scale: float) -> None:
        """Follow the optimizer's step, taken at `learning_rate` after losses that `loss_scale` had multiplied."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs beside the trained weights: tensors by name, and JSON-able values."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""

    def detach(self) -> None:
        """Give the models back as they were. The object cannot be used afterwards."""
        for flat in self.flats:
            flat.detach()


class NoisyGradient(StepGradient):
    """The gradient at W + eps, Flat-LoRA, with a new eps for each micro-batch or for each step."""

    def __init__(self, flats: Sequence[FlatLora], per: PerturbPer) -> None:
        self.flats, self._per = flats, per

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        if self._per == "step":
            with self._perturbed(step, 0):
                return [batch.backward() for batch in micro_batches]
        losses = []
        with _together(flat.one_step() for flat in self.flats):  # so that norms are taken once
            for batch in micro_batches:
                with self._perturbed(step, batch.slot):
                    losses.append(batch.backward())
        return losses

    def _perturbed(self, step: int, slot: int) -> AbstractContextManager[None]:
        return _together(flat.perturb(step, slot) for flat in self.flats)


def plain_gradient(inputs: GradientInputs) -> StepGradient:
    """The gradient at the weights as they are."""
    return StepGradient()


def noisy_gradient(inputs: GradientInputs) -> NoisyGradient:
    """The gradient at W + eps, each model with draws of its own."""
    return NoisyGradient(flat_loras(inputs), inputs.config.perturb_per)


def flat_loras(inputs: GradientInputs) -> list[FlatLora]:
    """The perturbation of each model's W, by the prefix of its draws."""
    noise = NoiseConfig.from_settings(inputs.config, inputs.seed, inputs.total_steps)
    return [FlatLora(model, noise, prefix=prefix) for prefix, model in inputs.models.items()]


@contextmanager
def _together(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def moved(steps: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """The parameters moved by `steps` while this is open; copies are put back, as subtracting would round."""
    kept = {parameter: parameter.detach().clone() for parameter in steps}
    try:
        with torch.no_grad():
            for parameter, step in steps.items():
                parameter.add_(step)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept.items():
                parameter.copy_(value)
