"""Low-rank noise: the covariance of Eq. 7 from k (m + n) instead of m n normal numbers per layer.

With independent N(0, 1) in U (m, k) and V (n, k), and row_std of Eq. 7:

    eps = diag(row_std) U V^T / sqrt(k)

Every entry has mean 0 and the variance of Eq. 7, and the entries are uncorrelated, so the second-order effect
1/2 Tr(H Cov) of eps on the loss is that of Eq. 7. The entries are not independent: their kurtosis is 3 + 6 / k.

Where PEFT computes y = W x + s B (A x), eps adds k ranks to that branch: with U' = diag(row_std) U / sqrt(k),
y = W x + [s B, U'] ([A; V^T] x), one operation instead of PEFT's five. For other layers (convolutions, DoRA, LoRA
dropout, several adapters) U' (V^T x) is added to W x.

The factors of all layers are sampled at once and live as long as the `LowRankDraw`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flatlora_diffusion.method.draw import Draw, DrawKey
from flatlora_diffusion.method.layers import AdaptedLayer
from flatlora_diffusion.method.noise import compute_dtype
from flatlora_diffusion.method.row_norms import RowStds

_SHIFT = 2.0**5  # moved from V to U': a power of two changes no bit of eps and keeps V^T x in the range of fp16

DRAW_RANK = 4  # k; the factors of the attention layers of SDXL's UNet take 11.6 MB

Pair = tuple[Tensor, Tensor]  # V^T (k, n) and U'^T (k, m)


def _purpose(group: int) -> tuple[str, ...]:
    """Return the seed purpose of the layers on the `group`-th device; the first device has no suffix."""
    return ("low-rank perturbation", f"device {group}") if group else ("low-rank perturbation",)


class LowRankDraw(Draw):
    """eps = diag(row_std) U V^T / sqrt(k). It depends on the order, sizes and devices of all layers."""

    fuses_with_lora = True
    shares_seed = True

    def __init__(
        self, layers: Mapping[str, AdaptedLayer], stds: Sequence[RowStds], sigma: float, key: DrawKey
    ) -> None:
        self._layers = layers
        self._groups: list[tuple[RowStds, Pair]] = []
        for index, group in enumerate(stds):
            rng = torch.Generator(device=group.stds.device)
            rng.manual_seed(key.derive(*_purpose(index)))
            ups = _normal(sum(group.rows), 1, rng).mul_(group.stds * (sigma * _SHIFT / math.sqrt(DRAW_RANK)))
            downs = _normal(sum(layer.inputs for layer in group.layers), 1 / _SHIFT, rng)
            # Rounded to bf16, so that eps is the same in all dtypes.
            self._groups.append((group, (downs.bfloat16(), ups.bfloat16())))
        self._factors = {torch.bfloat16: self._split(torch.bfloat16)}

    def noise(self, name: str) -> Tensor:
        down, up = self._pair(name, torch.float32)
        return (up.mT @ down).view(self._layers[name].shape)

    def base_output(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return layer.add_to_base_output(partial(self._product, layer), x, *args, **kwargs)

    def layer_output(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        branch = layer.fusable_branch()
        if branch is None:
            return None
        dtype = compute_dtype(x.device, branch[0].dtype)
        factors = self._pair(layer.name, dtype)
        # Autocast would cast x once for the base layer and once for the LoRA, and sum their gradients in fp32.
        is_castable = x.dtype == dtype or dtype != branch[0].dtype
        plain = layer.plain_weight_and_bias(dtype) if is_castable else None
        if plain is None:
            output: Tensor = _PerturbedLayer.apply(x.to(dtype), layer.base_hook.forward(x), None, *branch, *factors)
        else:
            output = _PerturbedLayer.apply(x.to(dtype), plain[1], plain[0], *branch, *factors)
        return output

    def _product(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        down, up = self._pair(layer.name, x.dtype)
        return layer.apply_frozen_factors(down, up.mT, x)

    def _pair(self, name: str, dtype: torch.dtype) -> Pair:
        """Return the factors of layer `name` in `dtype`; compiled code casts them in its graph."""
        if torch.compiler.is_compiling():
            down, up = self._factors[torch.bfloat16][name]
            return down.to(dtype), up.to(dtype)
        if dtype not in self._factors:  # cast all layers at once
            with torch.inference_mode(False):  # backward may need them
                self._factors[dtype] = self._split(dtype)
        return self._factors[dtype][name]

    def _split(self, dtype: torch.dtype) -> dict[str, Pair]:
        factors: dict[str, Pair] = {}
        for group, (downs, ups) in self._groups:
            inputs = [layer.inputs for layer in group.layers]
            pairs = zip(downs.to(dtype).split(inputs, dim=1), ups.to(dtype).split(group.rows, dim=1), strict=True)
            factors.update(zip((layer.name for layer in group.layers), pairs, strict=True))
        return factors


class _PerturbedLayer(torch.autograd.Function):
    """base(x) + [s B, U'] ([A; V^T] x) for x (..., n), A (r, n), B (m, r), V^T (k, n), U'^T (k, m) in the dtype of x.

    With the frozen `weight` W (m, n), base(x) = W x + `base`, where `base` is the bias or None. Without it, `base` is
    base(x) itself (..., m). Differentiable once in x, in A and B, and in `base` if it is base(x).
    """

    @staticmethod
    def forward(  # noqa: PLR0913 (autograd needs the tensors as arguments)
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        drawn_down: Tensor,
        drawn_up: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = _joined(down, drawn_down).mm(rows.mT)  # (r + k, tokens): the transpose is slow on CPUs
        if scale != 1:
            hidden[: down.shape[0]].mul_(scale)
        ctx.save_for_backward(rows, hidden, down, up, drawn_down, drawn_up, weight)
        ctx.scale, ctx.x_shape = scale, x.shape
        whole_up = _joined(up.mT, drawn_up)
        shape = (*x.shape[:-1], up.shape[0])
        if weight is not None:
            output = rows.mm(weight.mT) if base is None else torch.addmm(base, rows, weight.mT)
            return output.addmm_(hidden.mT, whole_up).view(shape)
        assert base is not None
        if base.dtype == x.dtype:
            return torch.addmm(base.reshape(-1, base.shape[-1]), hidden.mT, whole_up).view(shape)
        return base + hidden.mT.mm(whole_up).view(shape).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, down, up, drawn_down, drawn_up, weight = ctx.saved_tensors
        rank = down.shape[0]
        grad_rows = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
        grad_hidden = _joined(up.mT, drawn_up).mm(grad_rows.mT)
        if ctx.scale != 1:
            grad_hidden[:rank].mul_(ctx.scale)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            whole_down = _joined(down, drawn_down)
            if weight is None:
                grad_x = grad_hidden.mT.mm(whole_down)
            else:
                grad_x = grad_rows.mm(weight).addmm_(grad_hidden.mT, whole_down)
            grad_x = grad_x.view(ctx.x_shape)
        if ctx.needs_input_grad[3]:
            grad_down = grad_hidden[:rank].mm(rows)
        if ctx.needs_input_grad[4]:
            grad_up = grad_rows.mT.mm(hidden[:rank].mT)
        return grad_x, grad if weight is None else None, None, grad_down, grad_up, None, None, None


def _joined(learned: Tensor, drawn: Tensor) -> Tensor:
    """Concatenate `learned` (r, ...) and `drawn` (k, ...) in the dtype of `drawn`."""
    return torch.cat((learned.to(drawn.dtype), drawn))


def _normal(columns: int, std: float, rng: torch.Generator) -> Tensor:
    """Return (k, columns) samples of N(0, std^2)."""
    return torch.empty(DRAW_RANK, columns, device=rng.device).normal_(0, std, generator=rng)
