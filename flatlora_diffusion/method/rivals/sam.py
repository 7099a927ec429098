"""Sharpness-aware minimization (arXiv:2010.01412): the gradient where the loss is about the worst within a radius.

    eps = rho * g / ||g||,  g the gradient at the weights;  the step descends along the gradient at weights + eps

Two passes with the same draws. LoRA-SAM ascends in A and B; SAM in W of all adapted layers at once, along a sketch of
g of a small rank, so that eps is a branch as small as a LoRA. Norms are over all layers. The loss that is told is that
at the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flatlora_diffusion.method.gradient import Ascent, GradientInputs, MicroBatch, StepGradient, moved
from flatlora_diffusion.method.layers import AdaptedLayer
from flatlora_diffusion.method.rivals.sketch import Sketches
from flatlora_diffusion.method.rivals.weight_gradients import SlopeReader, average, norm


def lora_sam(inputs: GradientInputs) -> LoraSam:
    """SAM over the factors of all models."""
    return LoraSam(list(inputs.trainable.values()), inputs.factors, inputs.config.radius)


def sam(inputs: GradientInputs) -> Sam:
    """SAM over the adapted W of all models."""
    return Sam(inputs.models.values(), list(inputs.trainable.values()), inputs.config.radius, inputs.seed)


def rehearse(model: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
    """A step's passes on meta tensors, for the estimate of memory: these have no norm to ask for."""
    method = Sam([model], [], rho=1.0, seed=0)
    with method.reading(Sketches(0, 0)) as sketches:
        for batch in micro_batches:
            batch.backward()
    with method.ascended(sketches):
        for batch in micro_batches:
            batch.backward()
    method.detach()


class LoraSam(StepGradient):
    """SAM over A and B of the LoRA, which reaches only what these can move W to (arXiv:2409.14396, Eq. 4)."""

    ascends = True

    def __init__(self, trainable: Sequence[nn.Parameter], factors: Sequence[nn.Parameter], rho: float) -> None:
        self._trainable, self._factors, self._rho = trainable, factors, rho

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        batches, self.ascent = list(micro_batches), None
        losses = [batch.backward() for batch in batches]
        slopes = {factor: factor.grad for factor in self._factors if factor.grad is not None}
        length = norm(slopes.values())
        if not _can_ascend(length):
            return losses
        with moved({factor: slope * (self._rho / length) for factor, slope in slopes.items()}):
            _zero_grads(self._trainable)
            self.ascent = Ascent([batch.backward() for batch in batches], self._rho * length)
        return losses


class Sam(SlopeReader, StepGradient):
    """SAM over W of the adapted layers, never written: its slope is sketched and eps added in their forward.

    `seed` is that of the sketches.
    """

    ascends = True

    def __init__(self, models: Iterable[nn.Module], trainable: Sequence[nn.Parameter], rho: float, seed: int) -> None:
        super().__init__(models)
        self._trainable, self._rho, self._seed = trainable, rho, seed
        self._eps: Sketches | None = None

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        batches, self.ascent = list(micro_batches), None
        with self.reading(Sketches(self._seed, step)) as slopes:
            losses = [batch.backward(is_shared=False) for batch in batches]
        slopes.average()
        length = slopes.norm()
        if not _can_ascend(length):
            average(
                weight.grad for weight in self._trainable if weight.grad is not None
            )  # as no second pass shares them
            return losses
        slopes.scale(self._rho / length)
        _zero_grads(self._trainable)
        with self.ascended(slopes):
            self.ascent = Ascent([batch.backward() for batch in batches], self._rho * length)
        return losses

    @contextmanager
    def ascended(self, eps: Sketches) -> Iterator[None]:
        """While this is open, adapted layers compute with W + eps."""
        self._eps = eps
        try:
            yield
        finally:
            self._eps = None

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        factors = None if self._eps is None else self._eps.factors(layer)
        if factors is None:
            return super()._base_forward(layer, x, *args, **kwargs)
        down, up = factors

        def added(x: Tensor) -> Tensor:
            return layer.fixed_product(down.to(x.dtype), up.to(x.dtype), x)

        return layer.with_added(added, x, *args, **kwargs)


def _zero_grads(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _can_ascend(length: Tensor) -> bool:
    """Whether there is a direction. What is not finite is left to the loop, which looks at the gradient."""
    return bool(length.isfinite() and length > 0)
