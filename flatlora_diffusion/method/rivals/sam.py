"""Sharpness-aware minimization (arXiv:2010.01412): the gradient where the loss is about the worst within a radius.

    eps = rho * g / ||g||,  g the gradient at the weights;  the step descends along the gradient at weights + eps

Two passes with the same draws. LoRA-SAM ascends in A and B; SAM in W of all adapted layers at once, for which it holds
one more fp32 number for each weight of them. Norms are over all layers. The loss that is told is that at the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from flatlora_diffusion.method.gradient import Ascent, MicroBatch, StepGradient, moved
from flatlora_diffusion.method.layers import AdaptedLayer
from flatlora_diffusion.method.noise import applied, layer_at
from flatlora_diffusion.method.rivals.weight_gradients import SlopeReader, average, norm


class LoraSam(StepGradient):
    """SAM over A and B of the LoRA, which reaches only what these can move W to (arXiv:2409.14396, Eq. 4)."""

    ascends = True

    def __init__(self, trainable: Sequence[nn.Parameter], factors: Sequence[nn.Parameter], rho: float) -> None:
        self._trainable, self._factors, self._rho = trainable, factors, rho

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        again, self.ascent = list(micro_batches), None
        losses = [one.backward() for one in again]
        slopes = {factor: factor.grad for factor in self._factors if factor.grad is not None}
        length = norm(slopes.values())
        if not _can_ascend(length):
            return losses
        with moved({factor: slope * (self._rho / length) for factor, slope in slopes.items()}):
            _forget(self._trainable)
            self.ascent = Ascent([one.backward() for one in again], self._rho * length)
        return losses


class Sam(SlopeReader, StepGradient):
    """SAM over W of the adapted layers, which is never written: its slope is read and eps added in their forward."""

    ascends = True

    def __init__(self, models: Iterable[nn.Module], trainable: Sequence[nn.Parameter], rho: float) -> None:
        super().__init__(models)
        self._trainable, self._rho = trainable, rho
        self._eps: dict[AdaptedLayer, Tensor] = {}

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        again, self.ascent = list(micro_batches), None
        with self.reading() as slopes:
            losses = [one.backward(is_shared=False) for one in again]
        average(slopes.values())
        length = norm(slopes.values())
        if not _can_ascend(length):
            average(one.grad for one in self._trainable if one.grad is not None)  # as no second pass shares them
            return losses
        for slope in slopes.values():
            slope.mul_(self._rho / length)
        _forget(self._trainable)
        self._eps = slopes
        try:
            self.ascent = Ascent([one.backward() for one in again], self._rho * length)
        finally:
            self._eps = {}
        return losses

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer not in self._eps:
            return super()._base_forward(layer, x, *args, **kwargs)
        eps = self._eps[layer]

        def added(x: Tensor) -> Tensor:
            if x.dtype == eps.dtype:
                return applied(x, eps, None, layer.convolution)
            return layer_at(x, partial(eps.to, x.dtype), layer.convolution)  # no copy of eps waits for backward

        return layer.with_added(added, x, *args, **kwargs)


def _forget(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _can_ascend(length: Tensor) -> bool:
    """Whether there is a direction. What is not finite is left to the loop, which looks at the gradient."""
    return bool(length.isfinite() and length > 0)
