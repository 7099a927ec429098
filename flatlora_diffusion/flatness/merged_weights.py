"""The merged weights W' of a LoRA as tensors, and the probe's loss as a function of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from flatlora_diffusion.adapter.delta import with_magnitudes
from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.evaluation.probe import Probe
from flatlora_diffusion.families.objective import Objective, sample_losses
from flatlora_diffusion.flatness.functional import Loss, Weights, loss_at


@dataclass(frozen=True)
class Delta:
    """A LoRA of one weight: W + up @ down, (m, r) and (r, n); DoRA then scales rows to `magnitude` (m,)."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None


Deltas = dict[str, Delta]
"""Deltas by parameter name."""

_SIDES = ("down", "up")


@torch.no_grad()
def lora_deltas(denoiser: nn.Module) -> Deltas:
    """Return the deltas of the LoRA that is loaded into `denoiser`, in fp32."""
    deltas = {}
    for name, layer in lora_layers(denoiser).items():
        (adapter,) = layer.active_adapters
        down, up = layer.lora_A[adapter].weight.float().flatten(1), layer.lora_B[adapter].weight.float().flatten(1)
        vectors = layer.lora_magnitude_vector
        magnitude = vectors[adapter].weight.float().flatten().clone() if adapter in vectors else None
        deltas[f"{name}.weight"] = Delta(down.clone(), up * layer.scaling[adapter], magnitude)
    return deltas


def base_weights(denoiser: nn.Module, names: Iterable[str]) -> Weights:
    """Return the parameters `names` of a denoiser without LoRA, in fp32."""
    parameters = dict(denoiser.named_parameters())
    return {name: parameters[name].detach().float() for name in names}


def merged(base: Weights, deltas: Mapping[str, Delta], strength: float = 1.0) -> Weights:
    """Return W' of each weight of `base`; it is W where the LoRA has no delta, and at strength 0."""
    return {
        name: _merged(weight, deltas[name], strength) if strength and name in deltas else weight
        for name, weight in base.items()
    }


def loss_of_factors(loss: Loss, base: Weights, deltas: Deltas) -> tuple[Loss, Weights]:
    """Return `loss` as a function of A (r, n) and sB (m, r) of each layer at fixed W, and the values of A and sB."""
    factors = {_key(name, side): getattr(delta, side) for name, delta in deltas.items() for side in _SIDES}
    return [partial(_at_factors, part, base, deltas) for part in loss], factors


def loss_on_probe(denoiser: nn.Module, objective: Objective, probe: Probe, batch_size: int) -> Loss:
    """Return the probe's mean loss as a function of weights of `denoiser`, which must be in eval mode."""
    count = len(probe.timesteps)
    return [
        loss_at(denoiser, partial(_part, objective=objective, probe=probe, part=slice(start, start + batch_size)))
        for start in range(0, count, batch_size)
    ]


def _part(denoiser: nn.Module, objective: Objective, probe: Probe, part: slice) -> Tensor:
    batch = probe.batch.map(lambda tensor: tensor[part])
    losses = sample_losses(denoiser, objective, batch, probe.noise[part], probe.timesteps[part])
    return losses.sum() / len(probe.timesteps)


def _at_factors(part: Callable[[Weights], Tensor], base: Weights, deltas: Deltas, factors: Weights) -> Tensor:
    changed = {
        name: replace(delta, **{side: factors[_key(name, side)] for side in _SIDES}) for name, delta in deltas.items()
    }
    return part(merged(base, changed))


def _key(name: str, side: str) -> str:
    return f"{name} {side}"


def _merged(weight: Tensor, delta: Delta, strength: float) -> Tensor:
    merged = weight + strength * (delta.up @ delta.down).view_as(weight)
    return merged if delta.magnitude is None else with_magnitudes(merged, delta.magnitude)
