"""A layer at W + eps + sBA with low-rank eps = U' V^T in one operation: W x + [s B, U'] ([A; V^T] x).

Knows neither seeds nor standard deviations, only the factors. Both operations are differentiable once in x, A and B.
Private parts of PyTorch used here: the operator `convolution_backward`, which the public `torch.nn.grad` calls with a
copy of the shape of x in place of x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flatlora_diffusion.method.noise import Convolution

Pair = tuple[Tensor, Tensor]  # V^T (k, n) and U'^T (k, m)
Branch = tuple[Tensor, Tensor, float]  # A, B and s


def perturbed_layer(
    x: Tensor, base: Tensor | None, weight: Tensor | None, branch: Branch, drawn: Pair, convolution: Convolution | None
) -> Tensor:
    """Return the output of a linear layer or, with `convolution`, of a Conv2d at W + eps + sBA.

    Args:
        x: (..., n), or ([B,] n, H, W) for a convolution, in the compute dtype.
        base: the bias or None; without `weight`, the output of the base layer at W.
        weight: the frozen W in the compute dtype, or None.
        branch: A, B and s of the LoRA.
        drawn: V^T and U'^T in the compute dtype.
        convolution: geometry of a convolution, None for a linear layer.
    """
    output: Tensor
    if convolution is None:
        output = _PerturbedLinear.apply(x, base, weight, *branch, *drawn)
        return output
    if x.ndim == 3:
        batched = base[None] if weight is None and base is not None else base
        return perturbed_layer(x[None], batched, weight, branch, drawn, convolution)[0]
    output = _PerturbedConvolution.apply(x, base, weight, *branch, *drawn, convolution)
    return output


class _PerturbedLinear(torch.autograd.Function):
    """base(x) + [s B, U'] ([A; V^T] x) for x (..., n), A (r, n), B (m, r), V^T (k, n), U'^T (k, m) in the dtype of x.

    With the frozen `weight` W (m, n), base(x) = W x + `base`, where `base` is the bias or None. Without it, `base` is
    base(x) itself (..., m), and the operation is differentiable in it too.
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


class _PerturbedConvolution(torch.autograd.Function):
    """The same for x (N, n, H, W), W (m, n, kh, kw), A (r, n, kh, kw), B (m, r, 1, 1), V^T (k, n kh kw), U'^T (k, m).

    [A; V^T] is one convolution with the geometry of W, and [s B, U'] is a convolution of 1 x 1.
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
        convolution: Convolution,
    ) -> Tensor:
        geometry = convolution.stride, convolution.padding
        whole_down, whole_up = _joined_kernels(down, up, drawn_down, drawn_up)
        hidden = F.conv2d(x, whole_down, None, *geometry)
        if scale != 1:
            hidden[:, : len(down)].mul_(scale)
        ctx.save_for_backward(x, hidden, down, up, drawn_down, drawn_up, weight)
        ctx.scale, ctx.geometry = scale, geometry
        output = F.conv2d(hidden, whole_up)
        if weight is not None:
            base = F.conv2d(x, weight, base, *geometry)
        assert base is not None
        return output.add_(base) if output.dtype == base.dtype else base + output.to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up, drawn_down, drawn_up, weight = ctx.saved_tensors
        rank = len(down)
        whole_down, whole_up = _joined_kernels(down, up, drawn_down, drawn_up)
        outer = grad.to(x.dtype)
        grad_hidden, grad_up = _gradients(outer, hidden, whole_up, ((1, 1), (0, 0)), (True, ctx.needs_input_grad[4]))
        if ctx.scale != 1:
            grad_hidden[:, :rank].mul_(ctx.scale)
        grad_x = grad_down = None
        if ctx.needs_input_grad[0]:
            grad_x, _ = _gradients(grad_hidden, x, whole_down, ctx.geometry, (True, False))
            if weight is not None:
                grad_x = _gradients(outer, x, weight, ctx.geometry, (True, False))[0].add_(grad_x)
        if ctx.needs_input_grad[3]:
            # A's rows alone: a CPU computes channels in blocks of 16, so r + k of them can cost twice as much.
            _, grad_down = _gradients(grad_hidden[:, :rank], x, down, ctx.geometry, (False, True))
        grad_up = None if grad_up is None else grad_up[:, :rank]
        return grad_x, grad if weight is None else None, None, grad_down, grad_up, None, None, None, None


def _joined_kernels(down: Tensor, up: Tensor, drawn_down: Tensor, drawn_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernels [A; V^T] (r + k, n, kh, kw) and [B, U'] (m, r + k, 1, 1)."""
    whole_down = torch.cat((down.to(drawn_down.dtype), drawn_down.view(-1, *down.shape[1:])))
    return whole_down, torch.cat((up.to(drawn_up.dtype), drawn_up.mT[:, :, None, None]), dim=1)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, geometry: Any, mask: tuple[bool, bool]) -> Any:
    """Return the gradients of a convolution in x and in its kernel, None where `mask` is False."""
    settings = None, *geometry, (1, 1), False, (0, 0), 1, (*mask, False)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, *settings)
    return grad_x, grad_weight


def _joined(learned: Tensor, drawn: Tensor) -> Tensor:
    """Concatenate `learned` (r, ...) and `drawn` (k, ...) in the dtype of `drawn`."""
    return torch.cat((learned.to(drawn.dtype), drawn))
