"""Count the bytes that a computation needs on a GPU by running it on meta tensors, which have no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_HALF_PRECISION = (F.linear, F.conv2d)  # the ops of our models that CUDA autocast runs in half precision
_FULL_PRECISION = (F.group_norm, F.layer_norm)  # in fp32


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that PyTorch ops create while open: currently `live`, and their `peak`.

    Each storage counts once until it is freed. Kernel workspaces and fragmentation are not included.

    Args:
        excluded: tensors that are not counted (weights, gradients, inputs).
    """

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._excluded = [tensor.untyped_storage() for tensor in excluded]  # referenced, so that ids stay unique
        self._storages: dict[int, Any] = {id(storage): None for storage in self._excluded}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size


class AsOnGpu(TorchFunctionMode):
    """Runs ops on meta tensors as a GPU does: with fused attention and, in half precision, CUDA's autocast.

    By default PyTorch computes the T x T matrix of unfused attention on meta tensors and does not cast.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_half = self._dtype != torch.float32
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")[len(args) :]
            inputs = (*args[:3], *(kwargs[name] for name in names))
            query, key, value = (_cast(arg, self._dtype) if is_half else arg for arg in inputs)
            return _FusedAttention.apply(query, key, value)
        if is_half and func in _HALF_PRECISION + _FULL_PRECISION:
            dtype = self._dtype if func in _HALF_PRECISION else torch.float32
            args = [_cast(arg, dtype) for arg in args]
            kwargs = {name: _cast(arg, dtype) for name, arg in kwargs.items()}
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """Saves what flash and memory-efficient attention save: q, k, v, the output and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
