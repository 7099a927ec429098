"""Build the gradient computation of the method that a `PerturbConfig` names."""

from __future__ import annotations

from flatlora_diffusion.config import METHODS, function_at
from flatlora_diffusion.method.gradient import GradientInputs, StepGradient


def step_gradient(inputs: GradientInputs) -> StepGradient:
    """Return the gradient computation of `inputs.config.method`.

    Raises:
        ConfigError: a model has layers that the method does not support.
    """
    gradient: StepGradient = function_at(METHODS[inputs.config.method].build)(inputs)
    return gradient
