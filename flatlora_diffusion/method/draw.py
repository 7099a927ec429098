"""What the kinds of draws have in common: one eps for all layers, from its rows' standard deviations and a key."""

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
    """All that eps depends on beside the layers and their norms."""

    seed: int
    prefix: str
    step: int
    slot: int

    def derive(self, purpose: str, *path: str) -> int:
        return derive_seed(self.seed, purpose, self.prefix, *path, self.step, self.slot)


class Draw(ABC):
    """The eps of one micro-batch or step, a constant of the loss: the same in each forward and backward.

    `stds` are those of Eq. 7 at sigma 1, by device.
    """

    acts_in_branch = False  # whether `layer_output` may take a part
    is_joint = False  # whether one layer's eps depends on which others there are

    @abstractmethod
    def __init__(
        self, layers: Mapping[str, AdaptedLayer], stds: Sequence[RowStds], sigma: float, key: DrawKey
    ) -> None: ...

    @abstractmethod
    def noise(self, name: str) -> Tensor:
        """eps of layer `name`, materialized: fp32, shape of W."""

    @abstractmethod
    def base_output(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer gives at W + eps."""

    def layer_output(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        """What base and LoRA give together at W + eps + sBA; None where `base_output` and PEFT are to do it."""
        return None
