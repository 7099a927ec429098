"""BAR (arXiv:2410.14802): the effect of SAM on the balance of A and B in each layer, without its second pass.

nBAR: before the optimizer step A is multiplied by 1 + c and B by 1 - c if ||dL/dA|| >= ||dL/dB||, otherwise A by 1 - c
and B by 1 + c. c = strength * learning rate * a cosine that decays to 0 over the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatlora_diffusion.method.gradient import GradientInputs, StepGradient
from flatlora_diffusion.method.layers import FactorPair, factor_pairs


def balanced_gradient(inputs: GradientInputs) -> BalancedGradient:
    """Build nBAR over all models."""
    return BalancedGradient(
        factor_pairs(inputs.models.values()), inputs.config.effective_bar_strength, inputs.total_steps
    )


class BalancedGradient(StepGradient):
    """The gradient at the current weights; A and B of each of the `pairs` are balanced before the update."""

    def __init__(self, pairs: Sequence[FactorPair], strength: float, total_steps: int) -> None:
        self._pairs, self._strength, self._total = pairs, strength, total_steps

    @torch.no_grad()
    def before_update(self, step: int, learning_rate: float) -> None:
        progress = min(step / self._total, 1.0)
        scale = self._strength * learning_rate * (1 + math.cos(math.pi * progress)) / 2
        for down, up, _ in self._pairs:
            sign = _sign(down.grad, up.grad)
            down.mul_(1 + scale * sign)
            up.mul_(1 - scale * sign)


def _sign(first: Tensor | None, second: Tensor | None) -> Tensor:
    """Return 1 if ||first|| >= ||second||, else -1; 0 if a gradient is missing or not finite."""
    if first is None or second is None:
        return torch.zeros(())
    norms = torch.linalg.vector_norm(first), torch.linalg.vector_norm(second)
    sign = torch.where(norms[0] >= norms[1], 1.0, -1.0)
    return torch.where((norms[0] + norms[1]).isfinite(), sign, 0.0)
