"""Bi-LoRA (arXiv:2508.19564): an adversarial second LoRA ascends in the same backward pass.

    L(W + s B A + s B2 A2):  A and B descend, A2 and B2 ascend, then ||s B2 A2||_F over all layers is clipped to rho

The gradient is computed at perturbed weights as in SAM, but in a single pass. The second LoRA is not part of the PEFT
model and is active only while a gradient is computed: it is not in files, previews and validation.

The paper does not specify some details. Here both LoRAs have the same rank and learning rate, the second is trained by
AdamW without weight decay, and A2 and B2 are clipped by the same factor. If a gradient of A2 or B2 is not finite, both
stay the same in that step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.method.gradient import GradientInputs, MicroBatch, StepGradient
from flatlora_diffusion.method.layers import (
    AdaptedLayer,
    find_adapted_layers,
    first_adapter,
    rank_of,
    scale_of,
    square_norm,
)
from flatlora_diffusion.method.rivals.weight_gradients import average
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.storage.tensor_io import load_optimizer, optimizer_tensors


def bi_lora_gradient(inputs: GradientInputs) -> BiLora:
    """Build Bi-LoRA over all models."""
    return BiLora(inputs.models, inputs.config.effective_rho, inputs.seed)


def meta_passes(model: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
    """Run the passes of a step on meta tensors, for the memory estimate."""
    method = BiLora({"": model}, rho=1.0, seed=0)
    method.compute(0, micro_batches)
    method.detach()


class BiLora(StepGradient):
    """The gradient with an adversarial LoRA on every adapted layer of `models`, by the prefix of its seeds."""

    def __init__(self, models: Mapping[str, nn.Module], rho: float, seed: int) -> None:
        self._rho, self._is_active = rho, False
        self._pairs: dict[AdaptedLayer, tuple[nn.Parameter, nn.Parameter]] = {}
        self._scales: dict[AdaptedLayer, float] = {}
        for prefix, model in models.items():
            for layer in find_adapted_layers(model):
                self._scales[layer] = scale_of(layer.tuner, first_adapter(layer.tuner))
                self._pairs[layer] = _new_pair(layer, seed, prefix)
                layer.base_hook.attach(partial(self._base_forward, layer))
        self._optimizer = torch.optim.AdamW(self._parameters(), maximize=True, weight_decay=0.0)

    def compute(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        self._optimizer.zero_grad()
        self._is_active = True
        try:
            return [batch.backward() for batch in micro_batches]
        finally:
            self._is_active = False

    @torch.no_grad()
    def after_update(self, learning_rate: float, loss_scale: float) -> None:
        grads = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        average(grads)
        # The scaler of fp16 does not check these gradients. After the average all processes have the same.
        if all(torch.stack([grad.isfinite().all() for grad in grads]).tolist()):
            for grad in grads:
                grad /= loss_scale
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
        """Return ||s B2 A2||_F over all layers, without forming B2 A2, in one transfer from the device."""
        squares = torch.stack([square_norm(*pair) for pair in self._pairs.values()])
        scales = torch.tensor([self._scales[layer] for layer in self._pairs], dtype=torch.float64)
        return float((scales.square() * squares.cpu().double()).sum().clamp(min=0).sqrt())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, header = optimizer_tensors(self._optimizer)
        parameters = {f"parameter.{index}": parameter.detach() for index, parameter in enumerate(self._parameters())}
        return tensors | parameters, header

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        for index, parameter in enumerate(self._parameters()):
            parameter.copy_(tensors[f"parameter.{index}"])
        load_optimizer(self._optimizer, tensors, header)

    def detach(self) -> None:
        for layer in self._pairs:
            layer.base_hook.restore()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self._pairs.values() for parameter in pair]

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._is_active:
            return layer.base_hook.forward(x, *args, **kwargs)
        return layer.add_to_base_output(partial(self._second_lora, layer), x, *args, **kwargs)

    def _second_lora(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        down, up = (factor.to(x.dtype) for factor in self._pairs[layer])
        return self._scales[layer] * layer.apply_factors(down, up, x)


def _new_pair(layer: AdaptedLayer, seed: int, prefix: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A2 (r, n) ~ N(0, 1/r^2) and B2 (m, r) = 0 on the device of the layer, fp32."""
    rank = rank_of(layer.tuner, first_adapter(layer.tuner))
    # Sampled on the CPU, so that a seed gives the same values on every device.
    down = torch.randn(rank, layer.inputs, generator=generator("cpu", seed, "bi_lora", prefix, layer.name)) / rank
    device = layer.base.weight.device
    return nn.Parameter(down.to(device)), nn.Parameter(torch.zeros(layer.shape[0], rank, device=device))
