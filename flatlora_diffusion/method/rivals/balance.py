"""BAR (arXiv:2410.14802): what SAM does to the balance of A and B in each layer, without its second pass.

Before the optimizer's step A is multiplied by 1 + c and B by 1 - c, or the other way round, c = strength * learning
rate, which a cosine lowers to 0 over the run:

    nBAR: A grows where ||dL/dA|| >= ||dL/dB||, else B does
    oBAR: A shrinks where ||A|| >= ||B||, else B does
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatlora_diffusion.method.branch import Pair
from flatlora_diffusion.method.gradient import StepGradient


class Balanced(StepGradient):
    """The gradient at the weights, with A and B of each of the `pairs` balanced; oBAR where it is `by_weights`."""

    def __init__(self, pairs: Sequence[Pair], strength: float, by_weights: bool, total_steps: int) -> None:
        self._pairs, self._strength, self._by_weights, self._total = pairs, strength, by_weights, total_steps

    @torch.no_grad()
    def before_update(self, step: int, learning_rate: float) -> None:
        progress = min(step / self._total, 1.0)
        most = self._strength * learning_rate * (1 + math.cos(math.pi * progress)) / 2
        for down, up, _ in self._pairs:
            grows = -_larger(down, up) if self._by_weights else _larger(down.grad, up.grad)
            down.mul_(1 + most * grows)
            up.mul_(1 - most * grows)


def _larger(one: Tensor | None, other: Tensor | None) -> Tensor:
    """1 where ||one|| >= ||other||, else -1; 0 where one of them is not finite or not there."""
    if one is None or other is None:
        return torch.zeros(())
    first, second = torch.linalg.vector_norm(one), torch.linalg.vector_norm(other)
    sign = torch.where(first >= second, 1.0, -1.0)
    return torch.where((first + second).isfinite(), sign, 0.0)
