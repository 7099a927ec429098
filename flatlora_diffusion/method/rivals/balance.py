"""BAR (arXiv:2410.14802): what SAM does to the balance of A and B in each layer, without its second pass.

nBAR: before the optimizer's step A is multiplied by 1 + c and B by 1 - c where ||dL/dA|| >= ||dL/dB||, else the other
way round; c = strength * learning rate, which a cosine lowers to 0 over the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatlora_diffusion.method.branch import Pair, factor_pairs
from flatlora_diffusion.method.gradient import GradientInputs, StepGradient


def balanced(inputs: GradientInputs) -> Balanced:
    """nBAR over all models."""
    return Balanced(factor_pairs(inputs.models.values()), inputs.config.balance, inputs.total_steps)


class Balanced(StepGradient):
    """The gradient at the weights, with A and B of each of the `pairs` balanced."""

    def __init__(self, pairs: Sequence[Pair], strength: float, total_steps: int) -> None:
        self._pairs, self._strength, self._total = pairs, strength, total_steps

    @torch.no_grad()
    def before_update(self, step: int, learning_rate: float) -> None:
        progress = min(step / self._total, 1.0)
        most = self._strength * learning_rate * (1 + math.cos(math.pi * progress)) / 2
        for down, up, _ in self._pairs:
            grows = _larger(down.grad, up.grad)
            down.mul_(1 + most * grows)
            up.mul_(1 - most * grows)


def _larger(first: Tensor | None, second: Tensor | None) -> Tensor:
    """1 where ||first|| >= ||second||, else -1; 0 where either is missing or not finite."""
    if first is None or second is None:
        return torch.zeros(())
    norms = torch.linalg.vector_norm(first), torch.linalg.vector_norm(second)
    sign = torch.where(norms[0] >= norms[1], 1.0, -1.0)
    return torch.where((norms[0] + norms[1]).isfinite(), sign, 0.0)
