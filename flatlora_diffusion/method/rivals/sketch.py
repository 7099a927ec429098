"""A low-rank sketch of the gradient dL/dW of each adapted layer, its component in SKETCH_RANK main directions.

With a layer's inputs X (t, n) and dL/d(output) Y (t, m), so that G = dL/dW = Y^T X, and a normal random P (n, k), the
randomized range finder of arXiv:0909.4061 gives

    Q = orth(G P) = orth(Y^T (X P)),   R = Q^T G = (Y Q)^T X,   sketch = Q R

without forming G: k (m + n) instead of m n numbers. The sketch of a sum of gradients (of
micro-batches or processes) is the sketch of the sum of their sketches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flatlora_diffusion.method.layers import AdaptedLayer
from flatlora_diffusion.method.noise import Convolution, apply_layer
from flatlora_diffusion.method.rivals.weight_gradients import (
    average,
    is_distributed,
    matmul_fp32,
    norm,
    weight_gradient,
)
from flatlora_diffusion.storage.rng import generator

# Powers of two, which change no bit in fp32 and bf16, keep fp16 in its range: X P from overflow, eps from underflow.
_SHIFT = 2.0**6

SKETCH_RANK = 8  # k; on the tiny base SAM's gradient has a cosine of at least 0.99 with that of the full G


class _Pair(NamedTuple):
    """Q (m, k) with orthonormal columns and R (k, n) in fp32; k is at most m."""

    up: Tensor
    down: Tensor


class Sketches:
    """The sketches of a step, recorded by a `WeightGradientHook`. P depends on the seed, the step and n."""

    def __init__(self, seed: int, step: int) -> None:
        self._seed, self._step = seed, step
        self._pairs: dict[AdaptedLayer, _Pair] = {}
        self._projections: dict[tuple[int, torch.device], Tensor] = {}

    def sample_projections(self, layers: Iterable[AdaptedLayer]) -> None:
        """Sample P of all layers before the passes: a copy to the device inside backward would wait for the device."""
        for layer in layers:
            self._projection(layer.inputs, layer.base.weight.device)

    def add(self, layer: AdaptedLayer, x: Tensor, output_grad: Tensor) -> None:
        """Add the gradient of a call of `layer`; see `GradientSink`."""
        geometry, filter_shape = layer.convolution, layer.shape[1:]
        projection = self._projection(layer.inputs, x.device).to(x.dtype)
        hidden = apply_layer(x, projection.view(-1, *filter_shape), None, geometry)
        up = _basis(matmul_fp32(_rows(output_grad, geometry).mT, _rows(hidden, geometry)))
        up_rows = up.mT.to(output_grad.dtype)
        if geometry is None:
            projected = apply_layer(output_grad, up_rows)
        else:
            projected = apply_layer(output_grad, up_rows[:, :, None, None], None, Convolution())
        down = weight_gradient(x, projected, (up.shape[1], *filter_shape), geometry).flatten(1)
        pair, previous = _Pair(up, down), self._pairs.get(layer)
        if previous is not None:
            pair = self._sketch(layer, _Pair(torch.cat((previous.up, up), dim=1), torch.cat((previous.down, down))))
        self._pairs[layer] = pair

    def average(self) -> None:
        """Replace the sketches by those of the mean gradient of all processes."""
        if is_distributed():
            for layer, pair in self._pairs.items():
                self._pairs[layer] = self._sketch(layer, pair, is_shared=True)

    def norm(self) -> Tensor:
        """Return ||Q R||_F over all layers."""
        return norm(down for _, down in self._pairs.values())

    def scale(self, factor: Tensor) -> None:
        """Multiply the sketches by `factor`, in place, with entries of similar size in both of their factors."""
        for up, down in self._pairs.values():
            up /= _SHIFT
            down *= factor * _SHIFT

    def factors(self, layer: AdaptedLayer) -> tuple[Tensor, Tensor] | None:
        """Return R (k, n) and Q (m, k); None if no gradient of the layer was recorded."""
        pair = self._pairs.get(layer)
        return None if pair is None else (pair.down, pair.up)

    def _sketch(self, layer: AdaptedLayer, pair: _Pair, is_shared: bool = False) -> _Pair:
        """Return the sketch of Q R or, with `is_shared`, of its mean over processes."""
        image = pair.up @ (pair.down @ self._projection(layer.inputs, pair.up.device).mT)
        if is_shared:
            average([image])
        up = _basis(image)
        down = (up.mT @ pair.up) @ pair.down
        if is_shared:
            average([down])
        return _Pair(up, down)

    def _projection(self, inputs: int, device: torch.device) -> Tensor:
        """Return P^T (k, n), sampled on the CPU, so that a seed gives the same P on every device.

        Its length, which Q does not depend on, is such that X P has entries of the size of those of X.
        """
        key = inputs, device
        if key not in self._projections:
            rng = generator("cpu", self._seed, "sketch of slopes", inputs, self._step)
            sample = torch.randn(SKETCH_RANK, inputs, generator=rng)
            self._projections[key] = (sample * 2.0 ** -round(math.log2(inputs) / 2)).to(device)
        return self._projections[key]


def _rows(tensor: Tensor, convolution: Convolution | None) -> Tensor:
    """Reshape an input or output of a layer to (t, channels), t being tokens or pixels."""
    return (tensor if convolution is None else tensor.movedim(-3, -1)).flatten(0, -2)


def _basis(image: Tensor) -> Tensor:
    """Return an orthonormal basis that spans the columns of `image`; NaN if an entry is not finite."""
    device = "cpu" if image.device.type == "mps" else image.device  # MPS has no QR
    return torch.linalg.qr(image.to(device)).Q.to(image.device)
