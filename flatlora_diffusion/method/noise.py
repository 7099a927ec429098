"""Filter-scaled Gaussian noise regenerated from a seed, and the autograd op that computes a layer at W + eps.

Knows neither LoRA nor schedules nor models, only weights, standard deviations and seeds.
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
    """Geometry of a Conv2d; `stride` and `padding` are (height, width). Adapted layers have one group."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)


def apply_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, convolution: Convolution | None = None
) -> Tensor:
    """Return the output of a linear layer or, with `convolution`, of a Conv2d."""
    if convolution is None:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, convolution.stride, convolution.padding)


def compute_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """Return the autocast dtype of `device`, or `otherwise` without autocast. Meta tensors have no autocast."""
    if device.type == "meta":
        return otherwise
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else otherwise


@dataclass(frozen=True)
class NoiseSpec:
    """The data to regenerate eps of a layer: eps[i] = row_std[i] * z[i] with z ~ N(0, 1).

    Attributes:
        seed: seed of z, sampled by PyTorch's generator on the device of the weight.
        shape: shape of the weight, (m, n) or (m, n, kh, kw).
        dtype: compute dtype of the layer.
        convolution: geometry of a convolution, None for a linear layer.
    """

    seed: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    convolution: Convolution | None = None


def row_noise(row_std: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return eps of `shape` in fp32 with rows from N(0, row_std[i]^2), on the device of `row_std` (m,).

    It depends on the arguments and the device only: a private generator is seeded. CPU and CUDA give different numbers
    for the same seed.
    """
    return _scaled(None, _normal(row_std, shape, seed), row_std)


def noisy_layer(x: Tensor, bias: Tensor | None, weight: Tensor | None, row_std: Tensor, spec: NoiseSpec) -> Tensor:
    """Return the output of a layer at W + eps, or at eps alone if `weight` is None.

    Differentiable once in x and bias. Backward regenerates eps, so no buffer of the weight's size is saved.

    Args:
        x: (..., n), or ([B,] n, H, W) for a convolution, in `spec.dtype`.
        bias: (m,), or None.
        weight: W, or None.
        row_std: (m,) fp32.
        spec: seed, shape, dtype and geometry of the noise.
    """
    return layer_with_weight(x, partial(_effective_weight, weight, row_std, spec), spec.convolution, bias)


def layer_with_weight(
    x: Tensor, weight: Callable[[], Tensor], convolution: Convolution | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return the output of a layer whose constant weight `weight()` is made in forward and again in backward.

    Saves neither x nor the weight. Differentiable once in x and bias.
    """
    return _ConstantWeightLayer.apply(x, bias, weight, convolution)


class _ConstantWeightLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Callable[[], Tensor], convolution: Convolution | None
    ) -> Tensor:
        ctx.weight, ctx.convolution, ctx.x_shape = weight, convolution, x.shape
        return apply_layer(x, weight(), bias, convolution)

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
                grad_x = conv2d_input(size, weight, grad.reshape(batch), geometry.stride, geometry.padding)
                grad_x = grad_x.view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            filters_last = grad if geometry is None else grad.movedim(-3, -1)
            grad_bias = filters_last.reshape(-1, filters_last.shape[-1]).sum(dim=0)
        return grad_x, grad_bias, None, None


def _batched(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape (B, n, H, W) of a shape with or without B."""
    return (1, *shape)[-4:]


def _effective_weight(weight: Tensor | None, row_std: Tensor, spec: NoiseSpec) -> Tensor:
    """Return W + eps (or eps) from one fp32 buffer, cast to the compute dtype."""
    return _scaled(weight, _normal(row_std, spec.shape, spec.seed), row_std).to(spec.dtype)


def _scaled(weight: Tensor | None, z: Tensor, row_std: Tensor) -> Tensor:
    """Return W + diag(row_std) z, or diag(row_std) z if `weight` is None, in the memory of z."""
    per_row = row_std.view(-1, *[1] * (z.ndim - 1))
    return z.mul_(per_row) if weight is None else torch.addcmul(weight, z, per_row, out=z)


def _normal(row_std: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    rng = torch.Generator(device=row_std.device)
    rng.manual_seed(seed)
    return torch.empty(shape, dtype=torch.float32, device=row_std.device).normal_(generator=rng)
