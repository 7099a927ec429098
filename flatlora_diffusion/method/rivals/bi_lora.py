"""Bi-LoRA (arXiv:2508.19564): beside the LoRA a second one ascends in the same backward, and is dropped at the end.

    L(W + s B A + s B2 A2):  A and B descend, A2 and B2 ascend, then ||s B2 A2||_F over all layers is clipped to rho

So the step's gradient is taken where the loss is higher, as in SAM, in a single pass. The second LoRA lives in here,
not in PEFT, and acts only while a gradient is taken: files, previews and validation never see it.

Where the paper leaves it open we let both have one rank and learning rate, AdamW without decay ascend, and clip A2 and
B2 by the same factor. A step in which a slope of A2 or B2 is not finite leaves these two as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.method.branch import first_adapter, rank_of, scale_of, square_norm
from flatlora_diffusion.method.gradient import GradientInputs, MicroBatch, StepGradient
from flatlora_diffusion.method.layers import AdaptedLayer, find_adapted_layers
from flatlora_diffusion.method.rivals.weight_gradients import average
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.storage.tensor_io import load_optimizer, optimizer_tensors


def bi_lora(inputs: GradientInputs) -> BiLora:
    """Bi-LoRA over all models."""
    return BiLora(inputs.models, inputs.config.radius, inputs.seed)


def rehearse(model: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
    """A step's passes on meta tensors, for the estimate of memory."""
    second = BiLora({"": model}, rho=1.0, seed=0)
    second.take(0, micro_batches)
    second.detach()


class BiLora(StepGradient):
    """The gradient beside an adversarial LoRA on every adapted layer of `models`, by the prefix of its draws."""

    def __init__(self, models: Mapping[str, nn.Module], rho: float, seed: int) -> None:
        self._rho, self._is_on = rho, False
        self._pairs: dict[AdaptedLayer, tuple[nn.Parameter, nn.Parameter]] = {}
        self._scales: dict[AdaptedLayer, float] = {}
        for prefix, model in models.items():
            for layer in find_adapted_layers(model):
                self._scales[layer] = scale_of(layer.tuner, first_adapter(layer.tuner))
                self._pairs[layer] = _new_pair(layer, seed, prefix)
                layer.below.attach(partial(self._base_forward, layer))
        self._optimizer = torch.optim.AdamW(self._parameters(), maximize=True, weight_decay=0.0)

    def take(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        self._optimizer.zero_grad()
        self._is_on = True
        try:
            return [batch.backward() for batch in micro_batches]
        finally:
            self._is_on = False

    @torch.no_grad()
    def weights_moved(self, learning_rate: float, loss_scale: float) -> None:
        slopes = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        average(slopes)
        # The scaler of fp16 does not look at them. After the average all processes find the same.
        if all(torch.stack([slope.isfinite().all() for slope in slopes]).tolist()):
            for slope in slopes:
                slope /= loss_scale
            self._ascend(learning_rate)
        self._optimizer.zero_grad()

    def _ascend(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        norm = self.norm()
        if norm > self._rho:
            for parameter in self._parameters():
                parameter.mul_((self._rho / norm) ** 0.5)

    @torch.no_grad()
    def norm(self) -> float:
        """||s B2 A2||_F over all layers, without forming B2 A2; read from the device once."""
        squares = torch.stack([square_norm(*pair) for pair in self._pairs.values()])
        scales = torch.tensor([self._scales[layer] for layer in self._pairs], dtype=torch.float64)
        return float((scales.square() * squares.cpu().double()).sum().clamp(min=0).sqrt())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, header = optimizer_tensors(self._optimizer)
        own = {f"parameter.{index}": parameter.detach() for index, parameter in enumerate(self._parameters())}
        return tensors | own, header

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        for index, parameter in enumerate(self._parameters()):
            parameter.copy_(tensors[f"parameter.{index}"])
        load_optimizer(self._optimizer, tensors, header)

    def detach(self) -> None:
        for layer in self._pairs:
            layer.below.restore()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self._pairs.values() for parameter in pair]

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._is_on:
            return layer.below.forward(x, *args, **kwargs)
        return layer.with_added(partial(self._product, layer), x, *args, **kwargs)

    def _product(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        down, up = (factor.to(x.dtype) for factor in self._pairs[layer])
        return self._scales[layer] * layer.product(down, up, x)


def _new_pair(layer: AdaptedLayer, seed: int, prefix: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A2 (r, n) ~ N(0, 1/r^2) and B2 (m, r) = 0 on the layer's device, fp32."""
    rank = rank_of(layer.tuner, first_adapter(layer.tuner))
    # Drawn on the CPU, so that one seed gives one pair on every device.
    drawn = torch.randn(rank, layer.inputs, generator=generator("cpu", seed, "bi_lora", prefix, layer.name)) / rank
    device = layer.base.weight.device
    return nn.Parameter(drawn.to(device)), nn.Parameter(torch.zeros(layer.shape[0], rank, device=device))
