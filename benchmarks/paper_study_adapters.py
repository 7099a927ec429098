"""The adapters of a study, those of the paper's Table 5, and eps for the ones that `FlatLora` does not know."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from benchmarks.paper_study_settings import Settings
from flatlora_diffusion import FlatLora
from flatlora_diffusion.adapter.anchor import anchor, start_at_slopes
from flatlora_diffusion.adapter.layers import ADAPTER, lora_layers
from flatlora_diffusion.method.draw import DrawKey
from flatlora_diffusion.method.filter_norms import row_stds
from flatlora_diffusion.method.noise import row_noise
from flatlora_diffusion.method.settings import Settings as NoiseSettings

ALPHA = 16
FIRST_RANK = 1.5  # AdaLoRA's rank at its start, in terms of that at its end


class Noise(Protocol):
    """What `FlatLora` offers, as far as it is used here."""

    def perturb(self, step: int, slot: int = 0) -> AbstractContextManager[None]: ...

    def detach(self) -> None: ...


@dataclass(frozen=True)
class Adapter:
    """A model of which the adapter and the head are trained, or in full the `written` layers themselves.

    `written` has the layers by name whose W' no LoRA of PEFT's makes, with what makes it.
    """

    model: Any
    written: Mapping[str, tuple[nn.Parameter, Callable[[], Tensor]]]
    allocator: Any = None  # AdaLoRA's

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.trainable.values())

    def penalty(self) -> Tensor | float:
        """AdaLoRA's: how far A and B are from orthogonal, the mean of |P^T P - I| (arXiv:2303.10512, Eq. 4)."""
        if self.allocator is None:
            return 0.0
        layers = [layer for layer in self.model.modules() if isinstance(layer, AdaLoraLayer)]
        sides = [side for layer in layers for side in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T)]
        distances = [torch.linalg.matrix_norm(side @ side.T - torch.eye(len(side))) for side in sides]
        weight: float = self.allocator.peft_config[ADAPTER].orth_reg_weight
        return weight * torch.stack(distances).mean()

    def after_step(self, step: int) -> None:
        """Let AdaLoRA give its ranks to where they matter; while the gradients of `step` are there."""
        if self.allocator is not None:
            self.allocator.update_and_allocate(step + 1)


def adapted(
    model: Any, targets: str, settings: Settings, seed: int, slopes: Callable[[Adapter], Sequence[Tensor]]
) -> Adapter:
    """`model` with an adapter on the layers of its encoder that `targets` matches; `slopes` are LoRA-GA's."""
    encoder = model.encoder
    encoder.requires_grad_(False)
    if settings.variant == "full":
        weights = {name: layer.weight for name, layer in encoder.named_modules() if re.fullmatch(targets, name)}
        for weight in weights.values():
            weight.requires_grad_(True)
        return Adapter(model, {name: (weight, weight.detach) for name, weight in weights.items()})
    if settings.variant == "adalora":
        return _adalora(model, targets, settings)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=ALPHA,
        lora_dropout=settings.dropout,
        use_dora=settings.variant == "dora",
        init_lora_weights="pissa" if settings.variant == "pissa" else True,
        target_modules=targets,
    )
    encoder.add_adapter(lora, ADAPTER)
    adapter = Adapter(model, {})
    if settings.variant == "lora-ga":
        anchor(encoder, lora)
        start_at_slopes(encoder, dict(zip(lora_layers(encoder), slopes(adapter), strict=True)), seed)
    return adapter


def _adalora(model: Any, targets: str, settings: Settings) -> Adapter:
    """PEFT's, which has all of its first rank for a tenth of the steps and the wanted one for the last quarter."""
    config = AdaLoraConfig(
        target_r=settings.rank,
        init_r=round(FIRST_RANK * settings.rank),
        lora_alpha=ALPHA,
        lora_dropout=settings.dropout,
        target_modules=targets,
        tinit=settings.steps // 10,
        tfinal=settings.steps // 4,
        total_step=settings.steps,
    )
    allocator = AdaLoraModel(model.encoder, config, ADAPTER)
    layers = {name: layer for name, layer in model.encoder.named_modules() if isinstance(layer, AdaLoraLayer)}

    def merged(layer: Any) -> Callable[[], Tensor]:
        return lambda: layer.get_base_layer().weight + layer.get_delta_weight(ADAPTER)

    written = {name: (layer.get_base_layer().weight, merged(layer)) for name, layer in layers.items()}
    return Adapter(model, written, allocator)


def noise_of(adapter: Adapter, settings: NoiseSettings) -> Noise:
    """eps of Eq. 7 on the adapted layers."""
    if adapter.written:
        return WrittenNoise(adapter, settings)
    sigma, schedule, steps, seed = settings.sigma, settings.schedule, settings.total_steps, settings.seed
    noise, prefix, draw = settings.noise, settings.prefix, settings.draw
    return FlatLora(adapter.model.encoder, sigma, schedule, steps, seed, noise, prefix, draw=draw)


class WrittenNoise:
    """The eps that `FlatLora` would draw, written into W; a copy of W is put back, so that W keeps its bits."""

    def __init__(self, adapter: Adapter, settings: NoiseSettings) -> None:
        self._layers, self._settings = adapter.written, settings

    @contextmanager
    def perturb(self, step: int, slot: int = 0) -> Iterator[None]:
        kept = {name: weight.detach().clone() for name, (weight, _) in self._layers.items()}
        key = DrawKey(self._settings.seed, self._settings.prefix, step, slot)
        sigma = self._settings.sigma_at(step)
        try:
            with torch.no_grad():
                for name, (weight, merged) in self._layers.items():
                    std = row_stds(merged().square().sum(1), weight.shape[1], sigma, self._settings.noise)
                    weight.add_(row_noise(std, tuple(weight.shape), key.derive("perturbation", name)))
            yield
        finally:
            with torch.no_grad():
                for name, (weight, _) in self._layers.items():
                    weight.copy_(kept[name])

    def detach(self) -> None:
        """Nothing is attached."""
