"""The interface of the ways to sample eps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flatlora_diffusion.method.layers import AdaptedLayer
from flatlora_diffusion.method.row_norms import RowStds
from flatlora_diffusion.storage.rng import derive_seed


@dataclass(frozen=True)
class DrawKey:
    """The key of a sample: with the layers and their norms it determines eps."""

    seed: int
    prefix: str
    step: int
    slot: int

    def derive(self, purpose: str, *path: str) -> int:
        return derive_seed(self.seed, purpose, self.prefix, *path, self.step, self.slot)


class Draw(ABC):
    """The eps of a micro-batch or optimizer step: constant over its forward and backward passes.

    Args:
        layers: the perturbed layers by name.
        stds: the standard deviations of Eq. 7 at sigma 1, by device.
        sigma: relative radius of the noise.
        key: seeds the sample.
    """

    fuses_with_lora = False  # whether `layer_output` computes some layers
    shares_seed = False  # whether eps of a layer depends on the other layers of the model

    @abstractmethod
    def __init__(
        self, layers: Mapping[str, AdaptedLayer], stds: Sequence[RowStds], sigma: float, key: DrawKey
    ) -> None: ...

    @abstractmethod
    def noise(self, name: str) -> Tensor:
        """Return eps of layer `name`: fp32, shape of W."""

    @abstractmethod
    def base_output(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base layer at W + eps."""

    def layer_output(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        """Return the output of the whole layer at W + eps + sBA; None to compute it by `base_output` and PEFT."""
        return None
