"""`Batch`: the inputs of a base's denoiser, by names that only its family knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Condition = Mapping[str, Tensor]
"""Inputs of the denoiser by name, each (B, ...): they can be indexed, joined, repeated, zeroed and cached."""


@dataclass(frozen=True)
class Batch:
    """The model's inputs for B images, and their loss weights.

    latents: (B, C, h, w) fp32, normalized, unpacked.
    prompts: what `Base.encode_prompts` returns, or for trained text encoders `Base.tokenize`.
    geometry: what `Base.geometry` returns for sizes and crops.
    weights: (B,), factors of the images in the mean; None for 1.
    mask: (B, 1, h, w) in [0, 1], the weights of latent pixels; None for 1.
    input_perturbation: (B, C, h, w), added to the noise in the model's input but not to its target.
    """

    latents: Tensor
    prompts: Condition
    geometry: Condition
    weights: Tensor | None = None
    mask: Tensor | None = None
    input_perturbation: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `function` applied to each tensor."""
        optional = (self.weights, self.mask, self.input_perturbation)
        return Batch(
            function(self.latents),
            {name: function(value) for name, value in self.prompts.items()},
            {name: function(value) for name, value in self.geometry.items()},
            *(None if value is None else function(value) for value in optional),
        )


def joined(conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """Return the conditions of several images as one, in their order."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def masked(condition: Condition, mask: Tensor) -> dict[str, Tensor]:
    """Return the condition with zeros where mask (B,) is 0."""
    return {name: value * mask.to(value).view(-1, *[1] * (value.ndim - 1)) for name, value in condition.items()}
