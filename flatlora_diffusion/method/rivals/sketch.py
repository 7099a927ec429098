"""A sketch of dL/dW of each adapted layer: its component in the SKETCH_RANK directions that have most of it.

With a layer's inputs X (t, n) and dL/d(output) Y (t, m), so that G = dL/dW = Y^T X, and P (n, k) of N(0, 1), the
randomized range finder of arXiv:0909.4061 gives

    Q = orth(G P) = orth(Y^T (X P)),   R = Q^T G = (Y Q)^T X,   sketch = Q R

without G, which would take m n numbers in place of k (m + n). The sketch of a sum of slopes, as of several
micro-batches or processes, is that of the sum of their sketches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flatlora_diffusion.method.layers import AdaptedLayer
from flatlora_diffusion.method.noise import Convolution, applied
from flatlora_diffusion.method.rivals.weight_gradients import are_several, average, norm, product, slope_of_weight
from flatlora_diffusion.storage.rng import generator

SKETCH_RANK = 8  # k: on the tiny base the change of SAM's gradient has a cosine of 0.99 and more to that by all of G


class _Pair(NamedTuple):
    """Q (m, k), whose columns are orthonormal, and R (k, n); fp32, and of k' = min(m, k) where that is less."""

    up: Tensor
    down: Tensor


class Sketches:
    """Those of one step, read by a `SlopeReader`; P is a function of the seed, the step and the number of inputs n."""

    def __init__(self, seed: int, step: int) -> None:
        self._seed, self._step = seed, step
        self._pairs: dict[AdaptedLayer, _Pair] = {}
        self._drawn: dict[tuple[int, torch.device], Tensor] = {}

    def add(self, layer: AdaptedLayer, x: Tensor, slope_of_output: Tensor) -> None:
        geometry, filter_shape = layer.convolution, layer.shape[1:]
        random = self._random(layer.inputs, x.device).to(x.dtype)
        hidden = applied(x, random.view(-1, *filter_shape), None, geometry)
        up = _basis(product(_rows(slope_of_output, geometry).mT, _rows(hidden, geometry)))
        onto = up.mT.to(slope_of_output.dtype)
        if geometry is None:
            pulled = applied(slope_of_output, onto)
        else:
            pulled = applied(slope_of_output, onto[:, :, None, None], None, Convolution())
        down = slope_of_weight(x, pulled, (up.shape[1], *filter_shape), geometry).flatten(1)
        pair, held = _Pair(up, down), self._pairs.get(layer)
        if held is not None:
            pair = self._sketch(layer, _Pair(torch.cat((held.up, up), dim=1), torch.cat((held.down, down))))
        self._pairs[layer] = pair

    def average(self) -> None:
        """Let all processes have the sketches of the mean of their slopes."""
        if are_several():
            for layer, pair in self._pairs.items():
                self._pairs[layer] = self._sketch(layer, pair, is_shared=True)

    def norm(self) -> Tensor:
        """||Q R|| over all layers."""
        return norm(down for _, down in self._pairs.values())

    def scale(self, factor: Tensor) -> None:
        for _, down in self._pairs.values():
            down *= factor

    def factors(self, layer: AdaptedLayer) -> tuple[Tensor, Tensor] | None:
        """R (k, n) and Q (m, k); None where nothing of the layer was read."""
        pair = self._pairs.get(layer)
        return None if pair is None else (pair.down, pair.up)

    def _sketch(self, layer: AdaptedLayer, pair: _Pair, is_shared: bool = False) -> _Pair:
        """The sketch of Q R, and with `is_shared` of its mean over processes."""
        image = pair.up @ (pair.down @ self._random(layer.inputs, pair.up.device).mT)
        if is_shared:
            average([image])
        up = _basis(image)
        down = (up.mT @ pair.up) @ pair.down
        if is_shared:
            average([down])
        return _Pair(up, down)

    def _random(self, inputs: int, device: torch.device) -> Tensor:
        """P^T (k, n), drawn on the CPU, so that one seed gives one P on every device."""
        key = inputs, device
        if key not in self._drawn:
            rng = generator("cpu", self._seed, "sketch of slopes", inputs, self._step)
            self._drawn[key] = torch.randn(SKETCH_RANK, inputs, generator=rng).to(device)
        return self._drawn[key]


def _rows(tensor: Tensor, convolution: Convolution | None) -> Tensor:
    """(t, channels) of what a layer takes or gives, t being tokens or pixels."""
    return (tensor if convolution is None else tensor.movedim(-3, -1)).flatten(0, -2)


def _basis(image: Tensor) -> Tensor:
    """An orthonormal basis of the columns, and of more where they are dependent; NaN where one is not finite."""
    where = "cpu" if image.device.type == "mps" else image.device  # MPS has no QR
    return torch.linalg.qr(image.to(where)).Q.to(image.device)
