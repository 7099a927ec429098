"""Full noise, exactly Eq. 7: every entry of eps is sampled independently.

PyTorch's generators give different numbers on CPU and CUDA for the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flatlora_diffusion.method.draw import Draw, DrawKey
from flatlora_diffusion.method.layers import AdaptedLayer, adds_in_place
from flatlora_diffusion.method.noise import NoiseSpec, compute_dtype, noisy_layer, row_noise
from flatlora_diffusion.method.row_norms import RowStds


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
