"""A loss as a function of a dict of weights: values, gradients, Hessian-vector products and noise.

W' + eps is another dict, so the weights of the model are never written.
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
"""A loss as a sum of scalar parts: only one part's graph is in memory at a time."""

Metric = Literal["filter", "iid", "raw"]
"""The unit of a step in weight space, see `scales`."""


@dataclass(frozen=True)
class Estimate:
    """The values of at least two random draws, so that two LoRAs can be compared draw by draw."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return statistics.stdev(self.values) / len(self.values) ** 0.5

    def minus(self, other: Estimate) -> Estimate:
        """Return the differences under common draws, which have a smaller error than either estimate."""
        return Estimate(tuple(own - reference for own, reference in zip(self.values, other.values, strict=True)))


def loss_at(model: nn.Module, loss: Callable[[Any], Tensor]) -> Callable[[Weights], Tensor]:
    """Return `loss(model)` as a function of some parameters, by their names in `model`: one part of a `Loss`.

    The model should be in eval mode.
    """
    module = _LossModule(model, loss)
    return lambda weights: functional_call(module, {f"model.{name}": weight for name, weight in weights.items()}, ())


@torch.no_grad()
def value(loss: Loss, weights: Weights) -> float:
    """Return the loss at `weights`."""
    return sum(float(part(weights)) for part in loss)


def gradient(loss: Loss, weights: Weights) -> Weights:
    """Return dL/dw by name."""
    leaves = _leaves(weights)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for part in loss:
        gradients = torch.autograd.grad(part(leaves), list(leaves.values()), materialize_grads=True)
        for sum_, addend in zip(total.values(), gradients, strict=True):
            sum_ += addend
    return total


def hessian_vector(loss: Loss, weights: Weights, vector: Weights) -> Weights:
    """Return H v by name, without forming H: the gradient of <dL/dw, v>."""
    leaves = _leaves(weights)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for part in loss:
        gradients = torch.autograd.grad(part(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
        along = torch.stack([(grad * vector[name]).sum() for name, grad in zip(leaves, gradients, strict=True)]).sum()
        if not along.requires_grad:
            continue  # the part is linear in the weights
        products = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
        for sum_, addend in zip(total.values(), products, strict=True):
            sum_ += addend
    return total


@torch.no_grad()
def scales(weights: Weights, metric: Metric) -> Weights:
    """Return the unit of each row, (m, 1, ...) by name.

    `filter`: ||W'_i|| / sqrt(n), Eq. 7 of Flat-LoRA (arXiv:2409.14396), invariant to rescaling of layers.
    `iid`: the same for all rows of a layer, with the same energy as `filter`.
    `raw`: 1, plain weight space, which depends on the scale of layers.
    """
    return {name: _row_scale(weight, metric) for name, weight in weights.items()}


def noise(scale: Weights, weights: Weights, seed: int, draw: int) -> Weights:
    """Return Gaussian noise z * scale, with z a function of (seed, layer, draw), equal for all LoRAs.

    It is the eps of `FlatLora(unet, sigma=1, seed=seed, prefix=FLATNESS, draw="full")` in step `draw`.
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
    """Return weights + factor * step."""
    return {name: torch.add(weight, step[name].to(weight), alpha=factor) for name, weight in weights.items()}


def size(weights: Weights) -> int:
    """Return the number of weights."""
    return sum(weight.numel() for weight in weights.values())


class _LossModule(nn.Module):
    """A module whose forward is the loss of a model, so that `functional_call` replaces the model's weights in it."""

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
