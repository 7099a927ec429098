"""The low-rank draw: the covariance of Eq. 7 from k (m + n) normal numbers in place of m n, and W is never touched.

With independent N(0, 1) in U (m, k) and V (n, k), and row_std of Eq. 7:

    eps = diag(row_std) U V^T / sqrt(k)

Every entry has mean 0 and the variance of Eq. 7, and no two entries are correlated, so the second-order effect
1/2 Tr(H Cov) of eps on the loss is that of Eq. 7. The entries are not independent, and only moments beyond the second
tell: the kurtosis of one is 3 + 6 / k.

Where PEFT computes y = W x + s B (A x), eps is k more ranks of that branch: [B, U'] ([A; V'] x) with
U' = diag(row_std) U / (s sqrt(k)). Elsewhere (a convolution, DoRA, LoRA dropout) U' (V' x) is added to W x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flatlora_diffusion.method.adapted_layers import AdaptedLayer, compute_dtype
from flatlora_diffusion.method.draw import Draw, DrawKey

DRAW_RANK = 4  # k: the factors of all layers that LoRA adapts in SDXL's UNet by default take 11.6 MB


@dataclass(frozen=True)
class Factors:
    """eps of one layer: scale * up down, with up (m, k) and down (k, n)."""

    up: Tensor
    down: Tensor
    adapter: str | None  # the one whose branch carries eps, if one can
    scale: float  # its s, or 1


class LowRankDraw(Draw):
    """Factors of all layers, drawn at once and kept as bf16 as long as the draw is: k (m + n) numbers a layer.

    The layers' order and sizes belong to the key: a model with another layer has other draws in all.
    """

    acts_in_branch = True
    is_joint = True

    def __init__(self, layers: Mapping[str, AdaptedLayer], row_stds: Mapping[str, Tensor], key: DrawKey) -> None:
        self._layers = layers
        self._factors: dict[str, Factors] = {}
        seed = key.derive("low-rank perturbation")
        by_device: dict[torch.device, list[AdaptedLayer]] = {}
        for name, layer in layers.items():
            by_device.setdefault(row_stds[name].device, []).append(layer)
        for device, members in by_device.items():
            rng = torch.Generator(device=device)
            rng.manual_seed(seed)
            self._draw(members, row_stds, rng)

    def _draw(self, layers: list[AdaptedLayer], row_stds: Mapping[str, Tensor], rng: torch.Generator) -> None:
        carriers = [layer.carrier() or (None, 1.0) for layer in layers]
        usual = carriers[0][1]  # one s for all, as a rule: then one operation divides all rows by it
        stds = [
            row_stds[layer.name] if scale == usual else row_stds[layer.name] * (usual / scale)
            for layer, (_, scale) in zip(layers, carriers, strict=True)
        ]
        rows = torch.cat(stds).div_(usual * math.sqrt(DRAW_RANK))
        ups = _normal(len(rows), DRAW_RANK, rng).mul_(rows[:, None]).bfloat16().split([len(std) for std in stds])
        inputs = [layer.inputs for layer in layers]
        downs = _normal(DRAW_RANK, sum(inputs), rng).bfloat16().split(inputs, dim=1)
        for layer, up, down, (adapter, scale) in zip(layers, ups, downs, carriers, strict=True):
            self._factors[layer.name] = Factors(up, down, adapter, scale)

    def noise(self, name: str) -> Tensor:
        factors = self._factors[name]
        eps = factors.up.float() @ factors.down.float()
        return eps.mul_(factors.scale).view(self._layers[name].shape)

    def base_output(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = layer.base_forward(x, *args, **kwargs)
        factors = self._factors[layer.name]
        if layer.carries(factors.adapter, factors.scale) or not layer.is_active():
            return output
        dtype = compute_dtype(x.device, output.dtype)
        x, down, up = x.to(dtype), factors.down.to(dtype), factors.up.to(dtype)
        if layer.convolution is None:
            hidden = F.linear(x, down) * factors.scale
            return output + F.linear(hidden, up).to(output.dtype)
        kernels = down.reshape(DRAW_RANK, *layer.shape[1:])
        hidden = F.conv2d(x, kernels, None, layer.convolution.stride, layer.convolution.padding) * factors.scale
        return output + F.conv2d(hidden, up[:, :, None, None]).to(output.dtype)

    def takes_branch(self, layer: AdaptedLayer, adapter: str) -> bool:
        factors = self._factors[layer.name]
        return factors.adapter == adapter and layer.scales_by(adapter, factors.scale)

    def branch_output(self, layer: AdaptedLayer, adapter: str, x: Tensor) -> Tensor:
        down, up = layer.plain_pairs[adapter]
        dtype = compute_dtype(x.device, x.dtype)
        return _WiderBranch.apply(x.to(dtype), down.weight, up.weight, self._factors[layer.name])


class _WiderBranch(torch.autograd.Function):
    """[B, U'] ([A; V'] x): differentiable once in x (..., n), A (r, n) and B (m, r), eps being a constant.

    Of the wider matrices none is saved: they are joined again in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, factors: Factors) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = _joined(down, factors.down, x.dtype, 0).mm(rows.mT)  # (r + k, tokens): a thin matrix is slow on CPUs
        ctx.save_for_backward(rows, down, up, hidden)
        ctx.factors, ctx.x_shape = factors, x.shape
        return hidden.mT.mm(_joined(up, factors.up, x.dtype, 1).mT).view(*x.shape[:-1], len(up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, down, up, hidden = ctx.saved_tensors
        rank = len(down)
        grad = grad.reshape(-1, len(up))
        grad_hidden = _joined(up, ctx.factors.up, rows.dtype, 1).mT.mm(grad.mT)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_hidden.mT.mm(_joined(down, ctx.factors.down, rows.dtype, 0)).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            grad_down = grad_hidden[:rank].mm(rows)
        if ctx.needs_input_grad[2]:
            grad_up = hidden[:rank].mm(grad).mT
        return grad_x, grad_down, grad_up, None


def _joined(learned: Tensor, drawn: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """What is drawn behind what is learned, in `dtype`."""
    return torch.cat((learned.to(dtype), drawn.to(dtype)), dim)


def _normal(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    return torch.empty(rows, columns, device=rng.device).normal_(generator=rng)
