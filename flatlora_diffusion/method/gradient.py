"""How the gradient of an optimizer step is taken: the seam between a training loop and the methods.

The loop draws the micro-batches and moves the weights; a method decides where on the loss their gradients are taken,
and in how many passes. The simplest are here: at the weights, at W + eps, a mixture of both, and at A and B + eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flatlora_diffusion.config import PerturbPer
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.storage.rng import generator


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
        return [one.backward() for one in micro_batches]

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
    """The gradient at W + eps, Flat-LoRA, with a new eps for each micro-batch or example or one for the whole step."""

    def __init__(self, flats: Sequence[FlatLora], per: PerturbPer) -> None:
        self.flats, self._per = flats, per

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        if self._per == "step":
            with self._perturbed(step, 0):
                return [self._backward(one) for one in micro_batches]
        losses = []
        with _together(flat.one_step() for flat in self.flats):  # so that norms are taken once
            for one in micro_batches:
                with self._perturbed(step, one.slot):
                    losses.append(self._backward(one))
        return losses

    def _backward(self, micro_batch: MicroBatch) -> Tensor:
        return micro_batch.backward()

    def _perturbed(self, step: int, key: int) -> AbstractContextManager[None]:
        return _together(flat.perturb(step, key) for flat in self.flats)


class MixedGradient(NoisyGradient):
    """`share` times the gradient at W + eps and the rest at W, in two passes (arXiv:2404.00357, the mixed loss)."""

    def __init__(self, flats: Sequence[FlatLora], per: PerturbPer, share: float) -> None:
        super().__init__(flats, per)
        self._share = share

    def _backward(self, micro_batch: MicroBatch) -> Tensor:
        noisy = micro_batch.backward(self._share, is_shared=False)
        with _together(flat.disabled() for flat in self.flats):
            return self._share * noisy + (1 - self._share) * micro_batch.backward(1 - self._share)


class FactorNoise(NoisyGradient):
    """The gradient at A + eps and B + eps, each scaled to the factor's rows as Eq. 7 scales eps to those of W'.

    A control: it reaches only what A and B can move W to, and nothing of it is in B while B is 0.
    """

    def __init__(
        self, factors: Mapping[str, nn.Parameter], sigma_at: Callable[[int], float], seed: int, per: PerturbPer
    ) -> None:
        super().__init__((), per)
        self._factors, self._sigma_at, self._seed = factors, sigma_at, seed

    def sigma_at(self, step: int) -> float:
        return self._sigma_at(step)

    def _perturbed(self, step: int, key: int) -> AbstractContextManager[None]:
        return moved({factor: self._eps(name, step, key) for name, factor in self._factors.items()})

    def _eps(self, name: str, step: int, key: int) -> Tensor:
        rows = self._factors[name].detach().flatten(1)
        stds = self._sigma_at(step) * rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5
        drawn = torch.randn(
            rows.shape,
            generator=generator(rows.device, self._seed, "factor noise", name, step, key),
            device=rows.device,
        )
        return (drawn * stds).view_as(self._factors[name])


@contextmanager
def _together(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for one in contexts:
            stack.enter_context(one)
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
