"""The gradient of an optimizer step: the interface between a training loop and the methods.

The loop samples the micro-batches and updates the weights; a method decides at which weights their gradients are
computed and in how many passes. LoRA (at W) and Flat-LoRA (at W + eps) are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flatlora_diffusion.config import METHODS, PerturbConfig, PerturbPer, function_at
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.noise_config import NoiseConfig


class MicroBatch(Protocol):
    """A micro-batch with its noise and timesteps, so that every pass has the same loss."""

    @property
    def slot(self) -> int:
        """micro_batch * world_size + rank."""

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        """Add `weight` times the gradient of the loss to those of the parameters.

        Args:
            weight: factor of the gradient.
            is_shared: whether processes average their gradients after the last micro-batch of the step.

        Returns:
            The loss, detached.
        """


@dataclass(frozen=True)
class Ascent:
    """The losses at the perturbed weights of SAM.

    Attributes:
        losses: loss of each micro-batch at the perturbed weights.
        first_order_increase: rho ||g||, the increase of the loss to first order, times the loss scale of fp16.
    """

    losses: list[Tensor]
    first_order_increase: Tensor


@dataclass(frozen=True)
class GradientInputs:
    """The inputs of a method.

    Attributes:
        models: the adapted models by the prefix of their seeds.
        trainable: all trained parameters by name.
        config: the method's settings.
        seed: seed of the run, for methods without a seed of their own.
        total_steps: optimizer steps of the run.
    """

    models: Mapping[str, nn.Module]
    trainable: Mapping[str, nn.Parameter]
    config: PerturbConfig
    seed: int
    total_steps: int

    @property
    def factors(self) -> list[nn.Parameter]:
        """The factors A, B and AdaLoRA's E."""
        return [value for name, value in self.trainable.items() if any(f".lora_{side}." in name for side in "ABE")]


class StepGradient:
    """The gradient at the current weights: plain LoRA."""

    flats: Sequence[FlatLora] = ()
    ascends = False  # whether `compute` sets `ascent`
    ascent: Ascent | None = None  # of the last step; None if its gradient was 0 or not finite

    def sigma_at(self, step: int) -> float:
        """Return sigma in optimizer step `step`, 0 for methods without noise."""
        return self.flats[0].sigma_at(step) if self.flats else 0.0

    def compute(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        """Add the gradient of optimizer step `step` to those of the trained parameters; the weights stay the same.

        Returns:
            The loss of each micro-batch at the current weights or, with noise, at W + eps.
        """
        return [batch.backward() for batch in micro_batches]

    def before_update(self, step: int, learning_rate: float) -> None:
        """Change the weights before the optimizer step, when the gradients are complete."""

    def after_update(self, learning_rate: float, loss_scale: float) -> None:
        """Update the state of the method after an optimizer step; `loss_scale` is the factor of the losses in fp16."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state for a resumed run, without the trained weights: tensors by name, and JSON values."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""

    def detach(self) -> None:
        """Restore the models. The object cannot be used afterwards."""
        for flat in self.flats:
            flat.detach()


class NoisyGradient(StepGradient):
    """The gradient at W + eps (Flat-LoRA), with a new eps per micro-batch or per step."""

    def __init__(self, flats: Sequence[FlatLora], per: PerturbPer) -> None:
        self.flats, self._per = flats, per

    def compute(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        if self._per == "step":
            with self._perturbed(step, 0):
                return [batch.backward() for batch in micro_batches]
        losses = []
        with _all_of(flat.frozen_norms() for flat in self.flats):  # A and B do not change within the step
            for batch in micro_batches:
                with self._perturbed(step, batch.slot):
                    losses.append(batch.backward())
        return losses

    def _perturbed(self, step: int, slot: int) -> AbstractContextManager[None]:
        return _all_of(flat.perturb(step, slot) for flat in self.flats)


def plain_gradient(inputs: GradientInputs) -> StepGradient:
    """Build plain LoRA."""
    return StepGradient()


def noisy_gradient(inputs: GradientInputs) -> NoisyGradient:
    """Build Flat-LoRA, with separate noise in each model."""
    return NoisyGradient(flat_loras(inputs), inputs.config.perturb_per)


def flat_loras(inputs: GradientInputs) -> list[FlatLora]:
    """Return a `FlatLora` for each model."""
    noise = NoiseConfig.from_settings(inputs.config, inputs.seed, inputs.total_steps)
    return [FlatLora(model, noise, prefix=prefix) for prefix, model in inputs.models.items()]


@contextmanager
def _all_of(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def weights_shifted(steps: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Add `steps` to the parameters while open. Restores copies, because subtraction would round."""
    originals = {parameter: parameter.detach().clone() for parameter in steps}
    try:
        with torch.no_grad():
            for parameter, step in steps.items():
                parameter.add_(step)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in originals.items():
                parameter.copy_(value)


def step_gradient(inputs: GradientInputs) -> StepGradient:
    """Return the gradient computation of `inputs.config.method`.

    Raises:
        ConfigError: a model has layers that the method does not support.
    """
    gradient: StepGradient = function_at(METHODS[inputs.config.method].build)(inputs)
    return gradient
