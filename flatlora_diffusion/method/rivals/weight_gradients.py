"""The slope of the loss in W of the adapted layers, dL/dW, read while gradients of A and B are taken; W has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from flatlora_diffusion.method.gradient import MicroBatch
from flatlora_diffusion.method.layers import AdaptedLayer, find_adapted_layers
from flatlora_diffusion.method.noise import Convolution, compute_dtype


def read_slopes(models: Iterable[nn.Module], micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
    """dL/dW of each layer, summed over `micro_batches` and averaged over processes; fp32, shape of W.

    The gradients of the trained parameters are added to what they have.
    """
    reader = SlopeReader(models)
    try:
        with reader.reading(Slopes()) as slopes:
            for one in micro_batches:
                one.backward(is_shared=False)
    finally:
        reader.detach()
    average(slopes.values())
    return [slopes[layer] for layer in reader.layers]


def rehearse(model: nn.Module, micro_batches: Iterable[MicroBatch]) -> None:
    """The passes of `read_slopes` on meta tensors, for the estimate of memory."""
    reader = SlopeReader([model])
    with reader.reading(Slopes()):
        for batch in micro_batches:
            batch.backward()
    reader.detach()


class Reading(Protocol):
    """What is made of the slopes of all layers."""

    def add(self, layer: AdaptedLayer, x: Tensor, slope_of_output: Tensor) -> None:
        """Take in the slope of one call of `layer`: its inputs and dL/d(output), both as it computes with them."""


Read = TypeVar("Read", bound=Reading)


class Slopes(dict[AdaptedLayer, Tensor]):
    """dL/dW of each layer, summed; fp32, shape of W."""

    def add(self, layer: AdaptedLayer, x: Tensor, slope_of_output: Tensor) -> None:
        slope = slope_of_weight(x, slope_of_output, layer.shape, layer.convolution)
        if layer in self:
            slope += self[layer]
        self[layer] = slope


class SlopeReader:
    """Attached to the adapted layers of `models`, it reads their slopes where it is asked to."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.layers = [layer for model in models for layer in find_adapted_layers(model)]
        for layer in self.layers:
            layer.below.attach(partial(self._base_forward, layer))
        self._found: Reading | None = None
        # What has a gradient in any case, so that a layer whose inputs need none is asked for its own.
        self._asks = torch.zeros((), requires_grad=True)

    @contextmanager
    def reading(self, found: Read) -> Iterator[Read]:
        """The slopes of all that is computed, forward and backward, while this is open are added to `found`."""
        self._found = found
        try:
            yield found
        finally:
            self._found = None

    def detach(self) -> None:
        for layer in self.layers:
            layer.below.restore()

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = layer.below.forward(x, *args, **kwargs)
        if self._found is not None and layer.is_active():
            output = _Read.apply(output, x, self._asks, layer, self._found)
        return output


class _Read(torch.autograd.Function):
    """The output of a base layer as it is; in backward the layer's inputs and its output's gradient are handed on."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, asks: Tensor, layer: AdaptedLayer, found: Reading) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.found, ctx.dtype = layer, found, compute_dtype(x.device, output.dtype)
        return output.clone()  # bitsandbytes adds the LoRA's output in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        with _without_autocast(x.device):
            ctx.found.add(ctx.layer, x.detach().to(ctx.dtype), grad.to(ctx.dtype))
        return grad, None, None, None, None


def slope_of_weight(
    x: Tensor, slope_of_output: Tensor, shape: tuple[int, ...], convolution: Convolution | None
) -> Tensor:
    """dL/dW of a layer whose weight has `shape`, from its inputs and dL/d(output); fp32, of that shape."""
    if convolution is None:
        return product(slope_of_output.flatten(0, -2).mT, x.flatten(0, -2))
    # cuDNN takes fp32 in TF32 unless told otherwise, which holds all bits of what is in half precision.
    return conv2d_weight(x.float(), list(shape), slope_of_output.float(), convolution.stride, convolution.padding)


def product(one: Tensor, other: Tensor) -> Tensor:
    """The fp32 product of two matrices, those in half precision multiplied as they are where a GPU can."""
    device = one.device.type
    has_wide_output = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None  # PyTorch 2.8
    if one.dtype != torch.float32 and has_wide_output and device in ("cuda", "meta"):
        return torch.mm(one, other, out_dtype=torch.float32)
    return one.float() @ other.float()


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Sums in fp32 are none where backward is called under autocast; meta tensors have none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def are_several() -> bool:
    """Whether processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def average(slopes: Iterable[Tensor]) -> None:
    """Let all processes have the mean of their slopes, in place."""
    if not are_several():
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
