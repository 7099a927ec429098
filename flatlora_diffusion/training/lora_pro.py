"""LoRA-Pro (arXiv:2407.18242): steps of A and B that move W as nearly as possible along dL/dW.

For W' = W + s B A and G = dL/dW the gradients are g_A = s B^T G and g_B = s G A^T, and steps along h_A and h_B move W'
along s (B h_A + h_B A). The least-squares approximation of G has

    h_A = (B^T B)^+ g_A / s^2 + X A,    h_B = (I - B (B^T B)^+ B^T) g_B (A A^T)^+ / s^2 - B X

for any X. The X for which h_A and h_B are nearest to g_A and g_B solves

    (B^T B) X + X (A A^T) = -(B^T B)^+ g_A A^T / s^2

Here AdamW's moments are those of h_A and h_B. The paper's are those of s (B h_A + h_B A), which take two numbers for
each adapted weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.method.layers import FactorPair, factor_pairs

_MIN_EIGENVALUE = 1e-6  # relative to the largest; below is the fp32 rounding of A A^T and B^T B


class LoraPro(torch.optim.AdamW):
    """AdamW with the gradients of LoRA-Pro for the LoRA layers of `models`."""

    def __init__(self, groups: Sequence[dict[str, Any]], models: Iterable[nn.Module], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._models = tuple(models)
        self._pairs: list[FactorPair] | None = None

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Project the gradients in place, then step."""
        if self._pairs is None:
            self._pairs = factor_pairs(self._models)
        project_gradients(self._pairs)
        return super().step(closure)


@torch.no_grad()
def project_gradients(pairs: Sequence[FactorPair]) -> None:
    """Replace g_A and g_B by h_A and h_B in each pair that has gradients."""
    by_rank: dict[int, list[FactorPair]] = {}
    for pair in pairs:
        if pair.down.grad is not None and pair.up.grad is not None:
            by_rank.setdefault(len(pair.down), []).append(pair)
    for members in by_rank.values():
        small = torch.stack([_small_products(pair) for pair in members])
        scales = torch.tensor([pair.scale for pair in members], dtype=torch.float64)
        for pair, (left, right, mixes) in zip(members, _solve(small.cpu().double(), scales), strict=True):
            _replace_gradients(pair, left, right, mixes)


def _small_products(pair: FactorPair) -> Tensor:
    """B^T B, A A^T and g_A A^T, (3, r, r)."""
    down, up = pair.down.flatten(1), pair.up.flatten(1)
    assert pair.down.grad is not None
    return torch.stack([up.T @ up, down @ down.T, pair.down.grad.flatten(1) @ down.T])


def _solve(small: Tensor, scales: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(M, N, (X, Y)) of each layer, for h_A = M g_A + X A and h_B = g_B N - B Y.

    Args:
        small: B^T B, A A^T and g_A A^T of each layer, (L, 3, r, r); in double on the CPU, because MPS has neither
            float64 nor eigenvalues.
        scales: s of each layer, (L,).
    """
    ups, downs, products = small.unbind(1)
    up_values, up_basis = torch.linalg.eigh(ups)
    down_values, down_basis = torch.linalg.eigh(downs)
    squares = scales.square().view(-1, 1, 1)
    up_inverse, down_inverse = _inverse(up_values, up_basis), _inverse(down_values, down_basis) / squares
    projected = up_inverse @ products  # (B^T B)^+ g_A A^T, and g_A A^T = B^T g_B
    sums = up_values[:, :, None] + down_values[:, None, :]
    rotated = up_basis.mT @ (-projected / squares) @ down_basis
    down_mix = up_basis @ torch.where(sums > 0, rotated / sums, 0.0) @ down_basis.mT
    up_mix = projected @ down_inverse + down_mix
    return list(zip(up_inverse / squares, down_inverse, torch.stack([down_mix, up_mix], dim=1), strict=True))


def _inverse(values: Tensor, basis: Tensor) -> Tensor:
    """The pseudo-inverse of symmetric matrices from their eigenvalues (L, r) and eigenvectors (L, r, r)."""
    is_nonzero = values > _MIN_EIGENVALUE * values.amax(dim=1, keepdim=True)
    return (basis * torch.where(is_nonzero, 1 / values, 0.0)[:, None, :]) @ basis.mT


def _replace_gradients(pair: FactorPair, left: Tensor, right: Tensor, mixes: Tensor) -> None:
    """h_A = M g_A + X A and h_B = g_B N - B Y, with M `left`, N `right` and (X, Y) `mixes`."""
    down, up = pair.down.flatten(1), pair.up.flatten(1)
    assert pair.down.grad is not None
    assert pair.up.grad is not None
    left, right, down_mix, up_mix = (matrix.to(down) for matrix in (left, right, *mixes))
    down_grad, up_grad = pair.down.grad.flatten(1), pair.up.grad.flatten(1)
    pair.down.grad.copy_((left @ down_grad + down_mix @ down).view_as(pair.down))
    pair.up.grad.copy_((up_grad @ right - up @ up_mix).view_as(pair.up))
