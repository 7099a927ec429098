"""LoRA-Pro (arXiv:2407.18242): A and B step so that W moves as nearly as it can to where dL/dW would move it.

For W' = W + s B A and G = dL/dW the gradients are g_A = s B^T G and g_B = s G A^T, and steps along h_A and h_B move W'
along s (B h_A + h_B A). That is nearest to G, in the sense of least squares, for

    h_A = (B^T B)^+ g_A / s^2 + X A,    h_B = (I - B (B^T B)^+ B^T) g_B (A A^T)^+ / s^2 - B X

whatever X is. The X that keeps h_A and h_B nearest to g_A and g_B has

    (B^T B) X + X (A A^T) = -(B^T B)^+ g_A A^T / s^2

AdamW steps with h_A and h_B and keeps the moments of these; the paper's keeps those of s (B h_A + h_B A), two numbers
for each adapted weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.method.layers import FactorPair, factor_pairs

_LEAST = 1e-6  # of the largest eigenvalue: what is below is the rounding of fp32 in A A^T and B^T B


class LoraPro(torch.optim.AdamW):
    """AdamW over `groups`, in which the gradients of the LoRA of `models` are those of LoRA-Pro."""

    def __init__(self, groups: Sequence[dict[str, Any]], models: Iterable[nn.Module], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._models = tuple(models)
        self._pairs: list[FactorPair] | None = None

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Adjust the gradients that there are, in place, then step."""
        if self._pairs is None:
            self._pairs = factor_pairs(self._models)
        adjust(self._pairs)
        return super().step(closure)


@torch.no_grad()
def adjust(pairs: Sequence[FactorPair]) -> None:
    """Put h_A and h_B in place of g_A and g_B, in the gradients of each of the pairs that has them."""
    by_rank: dict[int, list[FactorPair]] = {}
    for pair in pairs:
        if pair.down.grad is not None and pair.up.grad is not None:
            by_rank.setdefault(len(pair.down), []).append(pair)
    for members in by_rank.values():
        small = torch.stack([_small_products(pair) for pair in members])
        scales = torch.tensor([pair.scale for pair in members], dtype=torch.float64)
        for pair, (of_down, of_up, mix) in zip(members, _solved(small.cpu().double(), scales), strict=True):
            _put(pair, of_down, of_up, mix)


def _small_products(pair: FactorPair) -> Tensor:
    """B^T B, A A^T and g_A A^T, (3, r, r)."""
    down, up = pair.down.flatten(1), pair.up.flatten(1)
    assert pair.down.grad is not None
    return torch.stack([up.T @ up, down @ down.T, pair.down.grad.flatten(1) @ down.T])


def _solved(small: Tensor, scales: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each layer M, N and Y in h_A = M g_A + X A and h_B = g_B N - B Y, and X: as (M, N, (X, Y)).

    In double and on the CPU: MPS has neither float64 nor eigenvalues, and the matrices are of the rank's size.
    """
    ups, downs, slopes = small.unbind(1)
    of_up, up_basis = torch.linalg.eigh(ups)
    of_down, down_basis = torch.linalg.eigh(downs)
    squares = scales.square().view(-1, 1, 1)
    up_inverse, down_inverse = _inverse(of_up, up_basis), _inverse(of_down, down_basis) / squares
    pulled = up_inverse @ slopes  # (B^T B)^+ g_A A^T, and g_A A^T = B^T g_B
    sums = of_up[:, :, None] + of_down[:, None, :]
    rotated = up_basis.mT @ (-pulled / squares) @ down_basis
    mix = up_basis @ torch.where(sums > 0, rotated / sums, 0.0) @ down_basis.mT
    away = pulled @ down_inverse + mix
    return list(zip(up_inverse / squares, down_inverse, torch.stack([mix, away], dim=1), strict=True))


def _inverse(values: Tensor, basis: Tensor) -> Tensor:
    """The pseudo-inverse of symmetric matrices from their eigenvalues (L, r) and eigenvectors (L, r, r)."""
    is_there = values > _LEAST * values.amax(dim=1, keepdim=True)
    return (basis * torch.where(is_there, 1 / values, 0.0)[:, None, :]) @ basis.mT


def _put(pair: FactorPair, of_down: Tensor, of_up: Tensor, mixes: Tensor) -> None:
    down, up = pair.down.flatten(1), pair.up.flatten(1)
    assert pair.down.grad is not None
    assert pair.up.grad is not None
    left, right, mix, away = (one.to(down) for one in (of_down, of_up, *mixes))
    down_slope, up_slope = pair.down.grad.flatten(1), pair.up.grad.flatten(1)
    pair.down.grad.copy_((left @ down_slope + mix @ down).view_as(pair.down))
    pair.up.grad.copy_((up_slope @ right - up @ away).view_as(pair.up))
