"""The slope of the loss in W of the adapted layers, dL/dW, read while gradients of A and B are taken; W has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from flatlora_diffusion.method.gradient import MicroBatch
from flatlora_diffusion.method.layers import AdaptedLayer, find_adapted_layers
from flatlora_diffusion.method.noise import compute_dtype


def read_slopes(models: Iterable[nn.Module], micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
    """dL/dW of each layer, summed over `micro_batches` and averaged over processes; fp32, shape of W.

    The gradients of the trained parameters are added to what they have.
    """
    reader = SlopeReader(models)
    try:
        with reader.reading() as slopes:
            for one in micro_batches:
                one.backward(is_shared=False)
    finally:
        reader.detach()
    average(slopes.values())
    return [slopes[layer] for layer in reader.layers]


class SlopeReader:
    """Attached to the adapted layers of `models`, it reads their slopes where it is asked to."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.layers = [layer for model in models for layer in find_adapted_layers(model)]
        for layer in self.layers:
            layer.below.attach(partial(self._base_forward, layer))
        self._slopes: dict[AdaptedLayer, Tensor] | None = None
        # What has a gradient in any case, so that a layer whose inputs need none is asked for its own.
        self._asks = torch.zeros((), requires_grad=True)

    @contextmanager
    def reading(self) -> Iterator[dict[AdaptedLayer, Tensor]]:
        """The slopes of all that is computed, forward and backward, while this is open; fp32, shape of W."""
        slopes: dict[AdaptedLayer, Tensor] = {}
        self._slopes = slopes
        try:
            yield slopes
        finally:
            self._slopes = None

    def detach(self) -> None:
        for layer in self.layers:
            layer.below.restore()

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = layer.below.forward(x, *args, **kwargs)
        if self._slopes is not None and layer.is_active():
            output = _Read.apply(output, x, self._asks, layer, self._slopes)
        return output


class _Read(torch.autograd.Function):
    """The output of a base layer as it is; in backward the layer's inputs and its output's gradient are handed on."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, asks: Tensor, layer: AdaptedLayer, slopes: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.slopes, ctx.dtype = layer, slopes, compute_dtype(x.device, output.dtype)
        return output.clone()  # bitsandbytes adds the LoRA's output in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        slope = _slope_of_weight(ctx.layer, x.detach().to(ctx.dtype), grad.to(ctx.dtype))
        if ctx.layer in ctx.slopes:
            slope += ctx.slopes[ctx.layer]
        ctx.slopes[ctx.layer] = slope
        return grad, None, None, None, None


def _slope_of_weight(layer: AdaptedLayer, x: Tensor, slope_of_output: Tensor) -> Tensor:
    """dL/dW from the layer's inputs and dL/d(output), both as it computes with them; fp32, shape of W."""
    if layer.convolution is None:
        return _product(slope_of_output.flatten(0, -2).mT, x.flatten(0, -2))
    # cuDNN takes fp32 in TF32 unless told otherwise, which holds all bits of what is in half precision.
    geometry = layer.convolution
    return conv2d_weight(x.float(), list(layer.shape), slope_of_output.float(), geometry.stride, geometry.padding)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """The fp32 product of two matrices, those in half precision multiplied as they are where a GPU can."""
    device = one.device.type
    has_wide_output = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None  # PyTorch 2.8
    if one.dtype != torch.float32 and has_wide_output and device in ("cuda", "meta"):
        return torch.mm(one, other, out_dtype=torch.float32)
    return one.float() @ other.float()


def average(slopes: Iterable[Tensor]) -> None:
    """Let all processes have the mean of their slopes, in place."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for slope in slopes:
        torch.distributed.all_reduce(slope)
        slope /= torch.distributed.get_world_size()


def norm(slopes: Iterable[Tensor]) -> Tensor:
    """||g|| over all of them."""
    norms = [torch.linalg.vector_norm(slope) for slope in slopes]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms]))
