"""A loss as a function of chosen weights: values, gradients, Hessian-vector products, and noise. No weight is written.

The weights are a dict of tensors, so W' + eps is only another dict: nothing has to be undone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatlora_diffusion.method.noise import row_noise
from flatlora_diffusion.method.row_norms import row_stds
from flatlora_diffusion.storage.rng import FLATNESS, derive_seed

Weights = dict[str, Tensor]
"""Weights by parameter name, each (m, n) or (m, n, kh, kw): m filters (rows)."""

Loss = Sequence[Callable[[Weights], Tensor]]
"""A loss as the sum of its parts, each a scalar: only one part's graph is in memory at a time."""

Metric = Literal["filter", "iid", "raw"]
"""The unit in which a step in weight space is measured, see `scales`."""


@dataclass(frozen=True)
class Estimate:
    """A mean over at least two random draws, of which the values are kept: two LoRAs are compared draw by draw."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return statistics.stdev(self.values) / len(self.values) ** 0.5

    def minus(self, other: Estimate) -> Estimate:
        """The differences under common draws, whose error is smaller than that of either."""
        return Estimate(tuple(one - two for one, two in zip(self.values, other.values, strict=True)))


def loss_at(model: nn.Module, loss: Callable[[Any], Tensor]) -> Callable[[Weights], Tensor]:
    """`loss` of the model as a function of some of its parameters, by their names in `model`: one part of a `Loss`.

    The model that `loss` is given has them in place of its own as long as that runs, and should be in eval mode.
    """
    lent = _Lent(model, loss)
    return lambda weights: functional_call(lent, {f"model.{name}": weight for name, weight in weights.items()}, ())


@torch.no_grad()
def value(loss: Loss, weights: Weights) -> float:
    """The loss at `weights`."""
    return sum(float(part(weights)) for part in loss)


def gradient(loss: Loss, weights: Weights) -> Weights:
    """dL/dw by name."""
    leaves = _leaves(weights)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for part in loss:
        gradients = torch.autograd.grad(part(leaves), list(leaves.values()), materialize_grads=True)
        for sum_, one in zip(total.values(), gradients, strict=True):
            sum_ += one
    return total


def hessian_vector(loss: Loss, weights: Weights, vector: Weights) -> Weights:
    """H v by name, without forming H: the gradient of <dL/dw, v>."""
    leaves = _leaves(weights)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for part in loss:
        slopes = torch.autograd.grad(part(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
        along = torch.stack([(slope * vector[name]).sum() for name, slope in zip(leaves, slopes, strict=True)]).sum()
        if not along.requires_grad:
            continue  # a part that is linear in the weights
        products = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
        for sum_, one in zip(total.values(), products, strict=True):
            sum_ += one
    return total


@torch.no_grad()
def scales(weights: Weights, metric: Metric) -> Weights:
    """The length of one unit for each row, (m, 1, ...) by name.

    `filter` is Eq. 7 of Flat-LoRA (arXiv:2409.14396), ||W'_i|| / sqrt(n): noise of sigma units has the relative row
    radius sigma. It is the same for a network whose layers are rescaled. `iid` gives all rows of a layer the same unit
    at equal energy. `raw` is 1: plain weight space, in which rescaling a layer changes every figure.
    """
    return {name: _row_scale(weight, metric) for name, weight in weights.items()}


def noise(scale: Weights, weights: Weights, seed: int, draw: int) -> Weights:
    """Gaussian noise of one unit: z * scale with z a function of (seed, layer, draw) alone, so equal for all LoRAs.

    It is the eps that `FlatLora(unet, sigma=1, seed=seed, prefix=FLATNESS, draw="full")` has in step `draw`.
    """
    return {
        name: row_noise(
            scale[name].flatten().float(),
            tuple(weight.shape),
            derive_seed(seed, "perturbation", FLATNESS, name.removesuffix(".weight"), draw, 0),
        )
        for name, weight in weights.items()
    }


def shifted(weights: Weights, step: Mapping[str, Tensor], factor: float) -> Weights:
    """weights + factor * step; exactly the weights for a factor of 0."""
    return {name: torch.add(weight, step[name].to(weight), alpha=factor) for name, weight in weights.items()}


def size(weights: Weights) -> int:
    """The number of weights."""
    return sum(weight.numel() for weight in weights.values())


class _Lent(nn.Module):
    """A model's loss as what a module computes, so that all that it asks of the model has the weights given."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self) -> Tensor:
        return self.loss(self.model)


def _leaves(weights: Weights) -> Weights:
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def _row_scale(weight: Tensor, metric: Metric) -> Tensor:
    scale = weight.flatten(1).norm(dim=1)
    scale = torch.ones_like(scale) if metric == "raw" else row_stds(scale.square(), weight[0].numel(), 1.0, metric)
    return scale.view(-1, *[1] * (weight.ndim - 1))
