"""What PEFT computes beside W in each kind of layer: the factors of its update s B A, and s.

Private touches of PEFT: that AdaLoRA's `SVDLinear` adds alpha / (r + 1e-5) B (A * E), r being the rank it began with,
and that its factors are parameters where those of other layers are modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class Pair(NamedTuple):
    """A (r, ...) and B (m, r, ...) of a layer, and s."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float


def factor_pairs(models: Iterable[nn.Module]) -> list[Pair]:
    """The trained A and B of every layer of a LoRA that has these two."""
    layers: list[Any] = [layer for model in models for layer in model.modules() if isinstance(layer, LoraLayer)]
    trained = [(layer, first_adapter(layer)) for layer in layers]
    return [Pair(layer.lora_A[one].weight, layer.lora_B[one].weight, scale_of(layer, one)) for layer, one in trained]


def first_adapter(layer: Any) -> str:
    """The adapter that came first, which is the trained one."""
    return str(next(iter(layer.lora_A)))


def has_branch(layer: Any) -> bool:
    """Whether the layer computes with factors that `factors_of` knows."""
    if isinstance(layer, AdaLoraLayer):
        return isinstance(layer, SVDLinear) and not layer.fan_in_fan_out and bool(layer.lora_A)
    return isinstance(layer.lora_A, nn.ModuleDict) and bool(layer.lora_A)


def adds_in_place(layer: Any) -> bool:
    """Whether the update is added to the very tensor that W's layer returns, which then must be no view."""
    return isinstance(layer, AdaLoraLayer)


def factors_of(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A and B of one adapter as the layer keeps them; of AdaLoRA diag(E) A and B, E being 0 where a rank was taken."""
    if isinstance(layer, AdaLoraLayer):
        return layer.lora_A[adapter] * layer.lora_E[adapter], layer.lora_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def scale_of(layer: Any, adapter: str) -> float:
    """s of one adapter."""
    scaling = float(layer.scaling[adapter])
    return scaling / (layer.r[adapter] + 1e-5) if isinstance(layer, AdaLoraLayer) else scaling


def square_norm(down: Tensor, up: Tensor) -> Tensor:
    """||B A||_F^2 = tr((B^T B)(A A^T)) of A (r, n) and B (m, r), without forming B A."""
    return ((up.mT @ up) * (down @ down.mT)).sum()


def rank_of(layer: Any, adapter: str) -> int:
    """The rank of one adapter, with those that AdaLoRA has taken."""
    down = layer.lora_A[adapter]
    return int(getattr(down, "weight", down).shape[0])
