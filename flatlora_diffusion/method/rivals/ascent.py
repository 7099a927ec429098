"""Sharpness-aware minimization (arXiv:2010.01412): the gradient where the loss is about the worst within a radius.

    eps = rho * g / ||g||,  g the gradient at the weights;  the step descends along the gradient at weights + eps

Two passes with the same draws. LoRA-SAM ascends in A and B; SAM in W of all adapted layers at once, for which it holds
one more fp32 number for each weight of them. Norms are over all layers. The loss that is told is that at the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from flatlora_diffusion.method.adapted_layers import AdaptedLayer, find_adapted_layers
from flatlora_diffusion.method.noise import applied
from flatlora_diffusion.method.step_gradient import MicroBatch, StepGradient, moved


class LoraSam(StepGradient):
    """SAM over A and B of the LoRA, which reaches only what these can move W to (arXiv:2409.14396, Eq. 4)."""

    def __init__(self, trainable: Sequence[nn.Parameter], factors: Sequence[nn.Parameter], rho: float) -> None:
        self._trainable, self._factors, self._rho = trainable, factors, rho

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        again = list(micro_batches)
        losses = [one.backward() for one in again]
        slopes = {factor: factor.grad for factor in self._factors if factor.grad is not None}
        norm = _norm(slopes.values())
        if not _can_ascend(norm):
            return losses
        with moved({factor: slope * (self._rho / norm) for factor, slope in slopes.items()}):
            _forget(self._trainable)
            for one in again:
                one.backward()
        return losses


class Sam(StepGradient):
    """SAM over W of the adapted layers, which is never written: its slope is read and eps added in their forward."""

    def __init__(self, models: Iterable[nn.Module], trainable: Sequence[nn.Parameter], rho: float) -> None:
        self._trainable, self._rho = trainable, rho
        self._layers = [layer for model in models for layer in find_adapted_layers(model)]
        for layer in self._layers:
            layer.below.attach(partial(self._base_forward, layer))
        self._slopes: dict[AdaptedLayer, Tensor] = {}
        self._is_reading = False
        # What has a gradient in any case, so that a layer whose inputs need none is asked for its own.
        self._asks = torch.zeros((), requires_grad=True)

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        again = list(micro_batches)
        try:
            self._is_reading = True
            losses = [one.backward(is_shared=False) for one in again]
            self._is_reading = False
            average(self._slopes.values())
            norm = _norm(self._slopes.values())
            if not _can_ascend(norm):
                average(one.grad for one in self._trainable if one.grad is not None)  # as no second pass shares them
                return losses
            for slope in self._slopes.values():
                slope.mul_(self._rho / norm)
            _forget(self._trainable)
            for one in again:
                one.backward()
            return losses
        finally:
            self._is_reading = False
            self._slopes = {}

    def detach(self) -> None:
        for layer in self._layers:
            layer.below.restore()

    def slopes(self, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        """dL/dW of each layer, summed over `micro_batches` and averaged over processes; fp32, shape of W."""
        try:
            self._is_reading = True
            for one in micro_batches:
                one.backward(is_shared=False)
            average(self._slopes.values())
            return [self._slopes[layer] for layer in self._layers]
        finally:
            self._is_reading = False
            self._slopes = {}
            _forget(self._trainable)

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._is_reading and layer in self._slopes:
            eps = self._slopes[layer]
            return layer.with_added(lambda x: applied(x, eps.to(x.dtype), None, layer.convolution), x, *args, **kwargs)
        output: Tensor = layer.below.forward(x, *args, **kwargs)
        if self._is_reading and layer.is_active():
            output = _Read.apply(output, x, self._asks, layer, self._add)
        return output

    def _add(self, layer: AdaptedLayer, x: Tensor, slope_of_output: Tensor) -> None:
        slope = _slope_of_weight(layer, x.float(), slope_of_output.float())
        if layer in self._slopes:
            self._slopes[layer] += slope
        else:
            self._slopes[layer] = slope


class _Read(torch.autograd.Function):
    """The output of a base layer as it is; in backward the layer's inputs and its output's gradient are handed on."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, asks: Tensor, layer: AdaptedLayer, add: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.add = layer, add
        return output.clone()  # bitsandbytes adds the LoRA's output in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.add(ctx.layer, x.detach(), grad)
        return grad, None, None, None, None


def _slope_of_weight(layer: AdaptedLayer, x: Tensor, slope_of_output: Tensor) -> Tensor:
    """dL/dW from the layer's inputs and dL/d(output), fp32, shape of W."""
    if layer.convolution is None:
        return slope_of_output.flatten(0, -2).mT @ x.flatten(0, -2)
    geometry = layer.convolution
    return conv2d_weight(x, list(layer.shape), slope_of_output, geometry.stride, geometry.padding)


def _forget(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _norm(slopes: Iterable[Tensor]) -> Tensor:
    """||g|| over all of them."""
    norms = [torch.linalg.vector_norm(slope) for slope in slopes]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _can_ascend(norm: Tensor) -> bool:
    """Whether there is a direction. What is not finite is left to the loop, which looks at the gradient."""
    return bool(norm.isfinite() and norm > 0)


def average(slopes: Iterable[Tensor]) -> None:
    """Let all processes have the mean of their slopes, in place."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for slope in slopes:
        torch.distributed.all_reduce(slope)
        slope /= torch.distributed.get_world_size()
