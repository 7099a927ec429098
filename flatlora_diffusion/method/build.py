"""The gradient of each step, by the method that a `PerturbConfig` names."""

from __future__ import annotations

from flatlora_diffusion.config import METHODS, function_at
from flatlora_diffusion.method.gradient import GradientInputs, StepGradient


def step_gradient(inputs: GradientInputs) -> StepGradient:
    """How the gradient of each step is taken.

    Raises:
        ConfigError: the models have layers that the method cannot be used with.
    """
    gradient: StepGradient = function_at(METHODS[inputs.config.method].build)(inputs)
    return gradient
