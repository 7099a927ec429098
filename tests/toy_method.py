"""A method as somebody would add it: a file with its gradient, for which `test_new_method.py` adds the row."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from flatlora_diffusion.method.gradient import GradientInputs, MicroBatch, StepGradient


class HalfGradient(StepGradient):
    """Half the gradient at the weights."""

    def compute(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        return [batch.backward(0.5) for batch in micro_batches]


def half(inputs: GradientInputs) -> HalfGradient:
    return HalfGradient()
