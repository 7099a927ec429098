"""The ways to sample eps: `FullDraw`, exactly Eq. 7, and `LowRankDraw`, with its mean and covariance.

PyTorch's generators give different numbers on CPU and CUDA for the same seed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.method.layers import AdaptedLayer, adds_in_place
from flatlora_diffusion.method.low_rank_layers import Pair, perturbed_layer
from flatlora_diffusion.method.noise import NoiseSpec, compute_dtype, noisy_layer, row_noise
from flatlora_diffusion.method.row_norms import RowStds
from flatlora_diffusion.storage.rng import derive_seed

DRAW_RANK = 4  # k; the factors of the attention layers of SDXL's UNet take 11.6 MB
_SHIFT = 2.0**5  # moved from V to U': a power of two changes no bit of eps and keeps V^T x in the range of fp16


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


class FullDraw(Draw):
    """eps[i, j] = row_std[i] * z[i, j] with independent z ~ N(0, 1), sampled again from its seed in every pass."""

    def __init__(
        self, layers: Mapping[str, AdaptedLayer], stds: Sequence[RowStds], sigma: float, key: DrawKey
    ) -> None:
        self._layers = layers
        self._row_stds = {name: row_std for group in stds for name, row_std in group.times(sigma).items()}
        self._seeds = {name: key.derive("perturbation", name) for name in self._row_stds}

    def noise(self, name: str) -> Tensor:
        return row_noise(self._row_stds[name], self._layers[name].shape, self._seeds[name])

    def base_output(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = layer.base
        if not (layer.is_active() and layer.is_fusable()):
            # Half-precision, quantized, sharded or trainable W: add x eps^T, so that eps is not rounded into W.
            return layer.add_to_base_output(lambda x: self._perturbed(layer, x, None, None), x, *args, **kwargs)
        # fp32 W: one buffer W + eps and no extra matmul; under autocast the sum is cast.
        x = x.to(compute_dtype(base.weight.device, base.weight.dtype))
        perturbed = self._perturbed(layer, x, None if base.bias is None else base.bias.to(x.dtype), base.weight)
        return perturbed.clone() if adds_in_place(layer.tuner) else perturbed

    def _perturbed(self, layer: AdaptedLayer, x: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        spec = NoiseSpec(self._seeds[layer.name], layer.shape, x.dtype, layer.convolution)
        return noisy_layer(x, bias, weight, self._row_stds[layer.name], spec)


class LowRankDraw(Draw):
    """eps = diag(row_std) U V^T / sqrt(k) with independent N(0, 1) in U (m, k) and V (n, k).

    Every entry has mean 0 and the variance of Eq. 7, and the entries are uncorrelated, so the second-order effect
    1/2 Tr(H Cov) of eps on the loss is that of Eq. 7. The entries are not independent: their kurtosis is 3 + 6 / k.

    Where PEFT computes y = W x + s B (A x), eps adds k ranks to that branch: with U' = diag(row_std) U / sqrt(k),
    y = W x + [s B, U'] ([A; V^T] x), one operation instead of PEFT's five (`low_rank_layers.py`). For other layers
    (DoRA, LoRA dropout, several adapters) U' (V^T x) is added to W x.

    The factors of all layers are sampled at once, from their order, sizes and devices, and live as long as the draw.
    """

    fuses_with_lora = True
    shares_seed = True

    def __init__(
        self, layers: Mapping[str, AdaptedLayer], stds: Sequence[RowStds], sigma: float, key: DrawKey
    ) -> None:
        self._layers = layers
        self._groups: list[tuple[RowStds, Pair]] = []
        for index, group in enumerate(stds):
            rng = torch.Generator(device=group.stds.device)
            rng.manual_seed(key.derive("low-rank perturbation", *([f"device {index}"] if index else [])))
            ups = _normal(sum(group.rows), 1, rng).mul_(group.stds * (sigma * _SHIFT / math.sqrt(DRAW_RANK)))
            downs = _normal(sum(layer.inputs for layer in group.layers), 1 / _SHIFT, rng)
            # Rounded to bf16, so that eps is the same in all dtypes.
            self._groups.append((group, (downs.bfloat16(), ups.bfloat16())))
        self._factors = {torch.bfloat16: self._split(torch.bfloat16)}

    def noise(self, name: str) -> Tensor:
        down, up = self._pair(name, torch.float32)
        return (up.mT @ down).view(self._layers[name].shape)

    def base_output(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return layer.add_to_base_output(partial(self._product, layer), x, *args, **kwargs)

    def layer_output(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        branch = layer.fusable_branch()
        if branch is None:
            return None
        dtype = compute_dtype(x.device, branch[0].dtype)
        factors = self._pair(layer.name, dtype)
        # Autocast would cast x once for the base layer and once for the LoRA, and sum their gradients in fp32.
        is_castable = x.dtype == dtype or dtype != branch[0].dtype
        plain = layer.plain_weight_and_bias(dtype) if is_castable else None
        weight, base = (None, layer.base_hook.forward(x)) if plain is None else plain
        return perturbed_layer(x.to(dtype), base, weight, branch, factors, layer.convolution)

    def _product(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        down, up = self._pair(layer.name, x.dtype)
        return layer.apply_frozen_factors(down, up.mT, x)

    def _pair(self, name: str, dtype: torch.dtype) -> Pair:
        """Return the factors of layer `name` in `dtype`; compiled code casts them in its graph."""
        if torch.compiler.is_compiling():
            down, up = self._factors[torch.bfloat16][name]
            return down.to(dtype), up.to(dtype)
        if dtype not in self._factors:  # cast all layers at once
            with torch.inference_mode(False):  # backward may need them
                self._factors[dtype] = self._split(dtype)
        return self._factors[dtype][name]

    def _split(self, dtype: torch.dtype) -> dict[str, Pair]:
        factors: dict[str, Pair] = {}
        for group, (downs, ups) in self._groups:
            inputs = [layer.inputs for layer in group.layers]
            pairs = zip(downs.to(dtype).split(inputs, dim=1), ups.to(dtype).split(group.rows, dim=1), strict=True)
            factors.update(zip((layer.name for layer in group.layers), pairs, strict=True))
        return factors


def _normal(columns: int, std: float, rng: torch.Generator) -> Tensor:
    """Return (k, columns) samples of N(0, std^2)."""
    return torch.empty(DRAW_RANK, columns, device=rng.device).normal_(0, std, generator=rng)
