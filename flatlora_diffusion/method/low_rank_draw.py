"""The low-rank draw: the covariance of Eq. 7 from k (m + n) normal numbers in place of m n, and W is never touched.

With independent N(0, 1) in U (m, k) and V (n, k), and row_std of Eq. 7:

    eps = diag(row_std) U V^T / sqrt(k)

Every entry has mean 0 and the variance of Eq. 7, and no two entries are correlated, so the second-order effect
1/2 Tr(H Cov) of eps on the loss is that of Eq. 7. The entries are not independent, and only moments beyond the second
tell: the kurtosis of one is 3 + 6 / k.

Where PEFT computes y = W x + s B (A x), eps is k more ranks of that branch: [B, U'] ([A; V'] x) with
U' = diag(row_std) U / (s sqrt(k)). Elsewhere (a convolution, DoRA, LoRA dropout) U' (V' x) is added to W x.

[A; V'] and [B, U'] of all layers are put together when a draw is made, side by side, so that a
pass calls no more operators than plain LoRA does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
    """[A; V'] and [B, U']^T of one layer, of which the last k rows make eps, scale * U' V'."""

    down: Tensor  # (r + k, n)
    up: Tensor  # (r + k, m)
    adapter: str | None  # the one whose branch carries eps, if one can
    scale: float  # its s, or 1
    version: int | None  # of the A and B that are in front; None where they are not

    @property
    def drawn(self) -> tuple[Tensor, Tensor]:
        """V' (k, n) and U'^T (k, m)."""
        return self.down[-DRAW_RANK:], self.up[-DRAW_RANK:]


class LowRankDraw(Draw):
    """Factors of all layers, drawn at once and kept as long as the draw is: k (m + n) numbers a layer.

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
        pairs = {
            layer.name: pair
            for layer, (adapter, _) in zip(layers, carriers, strict=True)
            if (pair := layer.whole_pair(adapter)) is not None
        }
        dtype = next((down.dtype for down, _ in pairs.values()), torch.bfloat16)
        names = [layer.name for layer in layers]
        u, v = _normal(len(rows), rng).mul_(rows), _normal(sum(layer.inputs for layer in layers), rng)
        ups = dict(zip(names, _rounded(u, dtype).split([len(std) for std in stds], dim=1), strict=True))
        downs = dict(zip(names, _rounded(v, dtype).split([layer.inputs for layer in layers], dim=1), strict=True))
        for members in _alike([layer for layer in layers if layer.name in pairs], pairs):
            computes_in = self._layers[members[0]].branch_dtype or dtype
            _put_above(downs, torch.cat([pairs[name][0] for name in members], dim=1), members, computes_in)
            _put_above(ups, torch.cat([pairs[name][1] for name in members]).mT, members, computes_in)
        for name, (adapter, scale) in zip(names, carriers, strict=True):
            version = _version(*pairs[name]) if name in pairs else None
            self._factors[name] = Factors(downs[name], ups[name], adapter, scale, version)

    def noise(self, name: str, example: int = 0) -> Tensor:
        factors = self._factors[name]
        down, up = factors.drawn
        eps = up.float().mT @ down.float()
        return eps.mul_(factors.scale).view(self._layers[name].shape)

    def base_output(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = layer.base_forward(x, *args, **kwargs)
        factors = self._factors[layer.name]
        if layer.carries(factors.adapter, factors.scale) or not layer.is_active():
            return output
        dtype = compute_dtype(x.device, output.dtype)
        x, (down, up) = x.to(dtype), (drawn.to(dtype) for drawn in factors.drawn)
        if layer.convolution is None:
            hidden = F.linear(x, down) * factors.scale
            return output + F.linear(hidden, up.mT).to(output.dtype)
        kernels = down.reshape(DRAW_RANK, *layer.shape[1:])
        hidden = F.conv2d(x, kernels, None, layer.convolution.stride, layer.convolution.padding) * factors.scale
        return output + F.conv2d(hidden, up.mT[:, :, None, None]).to(output.dtype)

    def takes_branch(self, layer: AdaptedLayer, adapter: str) -> bool:
        factors = self._factors[layer.name]
        return factors.adapter == adapter and layer.scales_by(adapter, factors.scale)

    def branch_output(self, layer: AdaptedLayer, adapter: str, x: Tensor) -> Tensor:
        down, up = (module.weight for module in layer.plain_pairs[adapter])
        factors = self._factors[layer.name]
        whole_down, whole_up = factors.down, factors.up
        dtype = compute_dtype(x.device, x.dtype)
        # What is compiled joins them by itself; else they are sharded or have changed since the draw.
        if torch.compiler.is_compiling() or factors.version != _version(down, up):
            own = zip((down.detach(), up.detach().mT), factors.drawn, strict=True)
            whole_down, whole_up = (torch.cat((learned, drawn.to(learned.dtype))) for learned, drawn in own)
        elif layer.branch_dtype != dtype:
            layer.branch_dtype = dtype
        return _WiderBranch.apply(x.to(dtype), down, up, whole_down.to(dtype), whole_up.to(dtype))


class _WiderBranch(torch.autograd.Function):
    """[B, U'] ([A; V'] x): differentiable once in x (..., n), A (r, n) and B (m, r), eps being a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, whole_down: Tensor, whole_up: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = whole_down.mm(rows.mT)  # (r + k, tokens): a thin matrix is slow on CPUs
        ctx.save_for_backward(rows, hidden, whole_down, whole_up)
        ctx.rank, ctx.x_shape = down.shape[0], x.shape
        return hidden.mT.mm(whole_up).view(*x.shape[:-1], up.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows, hidden, whole_down, whole_up = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_hidden = whole_up.mm(grad.mT)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_hidden.mT.mm(whole_down).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            grad_down = grad_hidden[: ctx.rank].mm(rows)
        if ctx.needs_input_grad[2]:
            grad_up = grad.mT.mm(hidden[: ctx.rank].mT)
        return grad_x, grad_down, grad_up, None, None


def _version(down: Tensor, up: Tensor) -> int:
    """A number that grows with every change of A or B; never None."""
    return down._version + up._version


def _normal(columns: int, rng: torch.Generator) -> Tensor:
    """(k, columns) of N(0, 1)."""
    return torch.empty(DRAW_RANK, columns, device=rng.device).normal_(generator=rng)


def _rounded(drawn: Tensor, dtype: torch.dtype) -> Tensor:
    """`drawn` in `dtype`, but rounded to bf16 whatever that is, so that eps is the same in all."""
    return drawn.bfloat16().to(dtype)


def _alike(layers: list[AdaptedLayer], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Iterable[list[str]]:
    """The names of layers whose matrices fit side by side: of one rank, in one dtype."""
    alike: dict[object, list[str]] = {}
    for layer in layers:
        alike.setdefault((pairs[layer.name][0].shape[0], layer.branch_dtype), []).append(layer.name)
    return alike.values()


def _put_above(drawn: dict[str, Tensor], learned: Tensor, names: list[str], dtype: torch.dtype) -> None:
    """Put each layer's columns of `learned` above what is `drawn` for it, in one matrix for all layers named."""
    columns = [drawn[name].shape[1] for name in names]
    whole = torch.cat((learned, torch.cat([drawn[name] for name in names], dim=1))).to(dtype)
    drawn.update(zip(names, whole.split(columns, dim=1), strict=True))
