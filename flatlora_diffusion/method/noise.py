"""The draws: filter-scaled Gaussian noise regenerated from a seed, and the op that computes with W + eps.

Nothing here knows LoRA, schedules or models: weights, standard deviations and seeds come in, tensors go out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input


@dataclass(frozen=True)
class Convolution:
    """Geometry of a Conv2d, each (height, width); adapted ones have a single group."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    groups: int = 1


def applied(x: Tensor, weight: Tensor, bias: Tensor | None = None, convolution: Convolution | None = None) -> Tensor:
    """What a layer with this weight gives for x."""
    if convolution is None:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, convolution.stride, convolution.padding, groups=convolution.groups)


def compute_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of autocast on `device`, or `otherwise` without autocast, which meta tensors do not have."""
    if device.type == "meta":
        return otherwise
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else otherwise


@dataclass(frozen=True)
class NoiseSpec:
    """All that is needed to make a layer's eps again: eps[i] = row_std[i] * z[i] with z ~ N(0, 1) from `seed`.

    `shape` is the weight's, (m, n) or (m, n, kh, kw); `dtype` is the dtype that the layer computes in. z comes from
    PyTorch's generator on the device.
    """

    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    convolution: Convolution | None = None


def row_noise(row_std: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """eps of `shape` in fp32, each row i drawn from N(0, row_std[i]^2), on the device of `row_std` (m,).

    A function of its arguments alone: a private generator of that device is seeded, no global one is touched. CPU and
    CUDA give different numbers for one seed.
    """
    return _scaled(None, _normal(row_std, shape, seed), row_std)


def perturbed_layer(x: Tensor, bias: Tensor | None, weight: Tensor | None, row_std: Tensor, spec: NoiseSpec) -> Tensor:
    """The layer's output at W + eps, or at eps alone when `weight` is None (the additive form).

    x: (..., n), or (B, n, H, W) with or without B, in `spec.dtype`. Differentiable once in x and bias. Keeps the (m,)
    `row_std` and no buffer of the weight's size: eps is drawn again in backward.
    """
    return layer_at(x, partial(_effective_weight, weight, row_std, spec), spec.convolution, bias)


def layer_at(
    x: Tensor, weight: Callable[[], Tensor], convolution: Convolution | None = None, bias: Tensor | None = None
) -> Tensor:
    """The layer's output with the constant weight that `weight()` makes, in the dtype of x, each time it is asked.

    It is asked in forward and again in backward; neither x nor the weight is kept. Differentiable once in x and bias.
    """
    return _PerturbedLayer.apply(x, bias, weight, convolution)


class _PerturbedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Callable[[], Tensor], convolution: Convolution | None
    ) -> Tensor:
        ctx.weight, ctx.convolution, ctx.x_shape = weight, convolution, x.shape
        return applied(x, weight(), bias, convolution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        geometry = ctx.convolution
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = ctx.weight()
            if geometry is None:
                grad_x = grad @ weight
            else:
                size, batch = (_batched(shape) for shape in (ctx.x_shape, grad.shape))
                settings = geometry.stride, geometry.padding, 1, geometry.groups
                grad_x = conv2d_input(size, weight, grad.reshape(batch), *settings).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            filters_last = grad if geometry is None else grad.movedim(-3, -1)
            grad_bias = filters_last.reshape(-1, filters_last.shape[-1]).sum(dim=0)
        return grad_x, grad_bias, None, None


def _batched(shape: torch.Size) -> tuple[int, ...]:
    """(B, n, H, W) of an image's shape with or without B."""
    return (1, *shape)[-4:]


def _effective_weight(weight: Tensor | None, row_std: Tensor, spec: NoiseSpec) -> Tensor:
    """W + eps (or eps) in one fp32 buffer, then cast once to the compute dtype."""
    return _scaled(weight, _normal(row_std, spec.shape, spec.seed), row_std).to(spec.dtype)


def _scaled(weight: Tensor | None, z: Tensor, row_std: Tensor) -> Tensor:
    """W + diag(row_std) z, or without W when `weight` is None, in the place of z."""
    per_row = row_std.view(-1, *[1] * (z.ndim - 1))
    return z.mul_(per_row) if weight is None else torch.addcmul(weight, z, per_row, out=z)


def _normal(row_std: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    rng = torch.Generator(device=row_std.device)
    rng.manual_seed(seed)
    return torch.empty(shape, dtype=torch.float32, device=row_std.device).normal_(generator=rng)
