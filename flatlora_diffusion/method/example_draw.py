"""The low-rank draw with an eps for each example of a micro-batch.

One eps for all examples does not average out over a micro-batch. With W + eps_b for example b each adds a draw of its
own to the mean of the gradient, for thin products: y_b += diag(row_std) U_b (V_b^T x_b) / sqrt(k).

Only low-rank draws can: of full ones each example would need a matrix of W's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.method.draw import Draw, DrawKey
from flatlora_diffusion.method.layers import AdaptedLayer
from flatlora_diffusion.method.low_rank_draw import DRAW_RANK, low_rank_path
from flatlora_diffusion.method.noise import layer_at
from flatlora_diffusion.method.row_norms import RowStds

Pair = tuple[Tensor, Tensor]  # V^T (B, k, n) and U^T (B, k, m), the latter times row_std / sqrt(k), in bf16


class ExampleDraw(Draw):
    """Examples are the first dimension of a layer's input. Their factors are drawn when there are so many of them.

    An example's eps depends on its place in the micro-batch beside the key, not on how many others there are.
    """

    is_joint = True

    def __init__(
        self, layers: Mapping[str, AdaptedLayer], stds: Sequence[RowStds], sigma: float, key: DrawKey
    ) -> None:
        self._layers, self._stds, self._sigma, self._key = layers, stds, sigma, key
        self._pairs: dict[str, Pair] = {}
        self._examples = 0

    def noise(self, name: str, example: int = 0) -> Tensor:
        down, up = self._factors(name, example + 1)
        return (up[example].float().mT @ down[example].float()).view(self._layers[name].shape)

    def base_output(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return layer.with_added(partial(self._added, layer), x, *args, **kwargs)

    def _added(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        if x.ndim == (1 if layer.convolution is None else 3):  # one example, without a dimension for it
            return self._added(layer, x.unsqueeze(0)).squeeze(0)
        return _product(layer, x, *(factor.to(x.dtype) for factor in self._factors(layer.name, len(x))))

    def _factors(self, name: str, examples: int) -> Pair:
        """Those of the first `examples` examples."""
        if examples > self._examples:
            with torch.inference_mode(False), torch.no_grad():  # a later backward may need them
                self._draw(examples)
            self._examples = examples
        down, up = self._pairs[name]
        return down[:examples], up[:examples]

    def _draw(self, examples: int) -> None:
        for group, some in enumerate(self._stds):
            device = some.stds.device
            stds = some.stds * (self._sigma / math.sqrt(DRAW_RANK))
            columns = [layer.inputs for layer in some.layers] + some.rows
            drawn = torch.empty(examples, DRAW_RANK, sum(columns), device=device)
            for example, numbers in enumerate(drawn):
                rng = torch.Generator(device=device)
                rng.manual_seed(self._key.derive(*low_rank_path(group, f"example {example}")))
                numbers.normal_(generator=rng)
            drawn[..., -len(stds) :].mul_(stds)
            pieces = drawn.bfloat16().split(columns, dim=2)  # the same eps whatever a layer computes in
            for layer, down, up in zip(some.layers, pieces, pieces[len(some.layers) :], strict=False):
                self._pairs[layer.name] = down, up


def _product(layer: AdaptedLayer, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """eps_b x_b of all examples b."""
    if layer.convolution is None:
        return (x.reshape(len(x), -1, layer.inputs) @ down.mT @ up).view(*x.shape[:-1], -1)
    grouped = replace(layer.convolution, groups=len(x))  # the kernels of one example are a group
    images = x.reshape(1, -1, *x.shape[2:])
    hidden = layer_at(images, lambda: down.reshape(-1, *layer.shape[1:]), grouped)
    return (up.mT @ hidden.reshape(len(x), DRAW_RANK, -1)).view(len(x), -1, *hidden.shape[-2:])
