"""The gradient dL/dW of the frozen W of the adapted layers, recorded while backward computes those of A and B."""

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


def read_weight_gradients(models: Iterable[nn.Module], micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
    """Return dL/dW of each adapted layer of `models`, summed over micro-batches and averaged over processes.

    Also adds the gradients of the trained parameters to their `grad`.

    Returns:
        Gradients in fp32, with the shape of W.
    """
    hook = WeightGradientHook(models)
    try:
        with hook.recording(WeightGradients()) as gradients:
            for batch in micro_batches:
                batch.backward(is_shared=False)
    finally:
        hook.detach()
    average(gradients.values())
    return [gradients[layer] for layer in hook.layers]


def meta_passes(model: nn.Module, micro_batches: Iterable[MicroBatch]) -> None:
    """Run the passes of `read_weight_gradients` on meta tensors, for the memory estimate."""
    hook = WeightGradientHook([model])
    with hook.recording(WeightGradients()):
        for batch in micro_batches:
            batch.backward()
    hook.detach()


class GradientSink(Protocol):
    """Receives the gradients of all layers."""

    def add(self, layer: AdaptedLayer, x: Tensor, output_grad: Tensor) -> None:
        """Add the gradient of a call of `layer`, from its input and dL/d(output) in the compute dtype."""


Sink = TypeVar("Sink", bound=GradientSink)


class WeightGradients(dict[AdaptedLayer, Tensor]):
    """The sum of dL/dW of each layer; fp32, shape of W."""

    def add(self, layer: AdaptedLayer, x: Tensor, output_grad: Tensor) -> None:
        """Add the gradient of a call of `layer`; see `GradientSink`."""
        gradient = weight_gradient(x, output_grad, layer.shape, layer.convolution)
        if layer in self:
            gradient += self[layer]
        self[layer] = gradient


class WeightGradientHook:
    """Hooks the adapted layers of `models` and records dL/dW of them while `recording` is open."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.layers = [layer for model in models for layer in find_adapted_layers(model)]
        for layer in self.layers:
            layer.base_hook.attach(partial(self._base_forward, layer))
        self._sink: GradientSink | None = None
        # Requires a gradient, so that backward also reaches layers whose input requires none.
        self._anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def recording(self, sink: Sink) -> Iterator[Sink]:
        """Add the gradients of the forward and backward passes inside the context to `sink`."""
        self._sink = sink
        try:
            yield sink
        finally:
            self._sink = None

    def detach(self) -> None:
        """Remove the hooks. The object cannot be used afterwards."""
        for layer in self.layers:
            layer.base_hook.restore()

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = layer.base_hook.forward(x, *args, **kwargs)
        if self._sink is not None and layer.is_active():
            output = _RecordGradient.apply(output, x, self._anchor, layer, self._sink)
        return output


class _RecordGradient(torch.autograd.Function):
    """Return the output of a base layer unchanged; backward passes its input and output gradient to the sink."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, layer: AdaptedLayer, sink: GradientSink
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.sink, ctx.dtype = layer, sink, compute_dtype(x.device, output.dtype)
        return output.clone()  # bitsandbytes layers add the LoRA in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        with _without_autocast(x.device):
            ctx.sink.add(ctx.layer, x.detach().to(ctx.dtype), grad.to(ctx.dtype))
        return grad, None, None, None, None


def weight_gradient(x: Tensor, output_grad: Tensor, shape: tuple[int, ...], convolution: Convolution | None) -> Tensor:
    """Return dL/dW of `shape` in fp32 from the input of the layer and dL/d(output)."""
    if convolution is None:
        return matmul_fp32(output_grad.flatten(0, -2).mT, x.flatten(0, -2))
    # cuDNN computes fp32 in TF32 by default, which is exact for half-precision inputs.
    return conv2d_weight(x.float(), list(shape), output_grad.float(), convolution.stride, convolution.padding)


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two matrices in fp32, without casting half-precision inputs where the GPU allows it."""
    has_wide_output = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None  # PyTorch 2.8
    if left.dtype != torch.float32 and has_wide_output and left.device.type in ("cuda", "meta"):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast, under which fp32 sums would be rounded; meta tensors have no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def average(tensors: Iterable[Tensor]) -> None:
    """Replace the tensors by their mean over all processes."""
    if not is_distributed():
        return
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm over all tensors."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([value.to(norms[0].device) for value in norms]))
