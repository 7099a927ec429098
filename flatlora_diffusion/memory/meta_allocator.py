"""The bytes that a computation would hold on a GPU, found by running it on meta tensors, which have no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_HALF_PRECISION = (F.linear, F.conv2d)  # what our models call of the ops that CUDA's autocast runs in half precision
_FULL_PRECISION = (F.group_norm, F.layer_norm)  # and in fp32


class LiveBytes(TorchDispatchMode):
    """Counts, while open, the bytes of all tensors made by PyTorch's ops: `live` now and their `peak`.

    `known` tensors (weights, gradients, inputs) are not counted. Each storage counts once, until its last tensor is
    gone. Memory that kernels take for themselves and the allocator's gaps are not seen.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # kept alive, so that no id is used again
        self._seen: dict[int, Any] = {id(storage): None for storage in self._known}

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
        if key in self._seen:
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        del self._seen[key]
        self.live -= size


class AsOnGpu(TorchFunctionMode):
    """Lets meta tensors be computed as a GPU would: fused attention and, in half precision, CUDA's autocast.

    Meta tensors have neither: PyTorch would take the unfused attention, which makes the T x T matrix, and no casts.
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
            query, key, value = (_cast(one, self._dtype) if is_half else one for one in args[:3])
            return _FusedAttention.apply(query, key, value)
        if is_half and func in _HALF_PRECISION + _FULL_PRECISION:
            dtype = self._dtype if func in _HALF_PRECISION else torch.float32
            args = [_cast(one, dtype) for one in args]
            kwargs = {name: _cast(one, dtype) for name, one in kwargs.items()}
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient attention keep: q, k, v, the output and a number per query and head."""

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
