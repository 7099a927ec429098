"""The adapters of a study, those of the paper's Table 5, each of the product itself, and eps for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.paper_study_settings import Settings
from flatlora_diffusion import FlatLora
from flatlora_diffusion.adapter.adalora import RankBudget, adalora_config, orthogonality, start_from_seed
from flatlora_diffusion.adapter.anchor import anchor, start_at_slopes
from flatlora_diffusion.adapter.full import widen
from flatlora_diffusion.adapter.layers import ADAPTER, lora_layers
from flatlora_diffusion.method.settings import Settings as NoiseSettings

ALPHA = 16


@dataclass(frozen=True)
class Adapter:
    """A model of which the adapter and the head are trained."""

    model: Any
    ranks: RankBudget | None = None  # AdaLoRA's

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.trainable.values())

    def penalty(self) -> Tensor | float:
        return 0.0 if self.ranks is None else orthogonality(self.model.encoder)

    def after_step(self, step: int) -> None:
        """Let AdaLoRA give its ranks to where they matter; while the gradients of `step` are there."""
        if self.ranks is not None:
            self.ranks.step_done(step + 1)


def adapted(
    model: Any, targets: str, settings: Settings, seed: int, slopes: Callable[[Adapter], Sequence[Tensor]]
) -> Adapter:
    """`model` with an adapter on the layers of its encoder that `targets` matches; `slopes` are LoRA-GA's."""
    encoder = model.encoder
    encoder.requires_grad_(False)
    if settings.variant == "adalora":
        encoder.add_adapter(adalora_config(settings.rank, ALPHA, settings.dropout, targets), ADAPTER)
        for layer in lora_layers(encoder).values():
            start_from_seed(layer, torch.randn(layer.r[ADAPTER], layer.in_features + layer.out_features))
        return Adapter(model, RankBudget(encoder, settings.steps))
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=ALPHA,
        lora_dropout=settings.dropout,
        use_dora=settings.variant == "dora",
        init_lora_weights="pissa" if settings.variant == "pissa" else True,
        target_modules=targets,
    )
    encoder.add_adapter(lora, ADAPTER)
    if settings.variant == "full":
        widen(encoder)
    adapter = Adapter(model)
    if settings.variant == "lora-ga":
        anchor(encoder, lora)
        start_at_slopes(encoder, dict(zip(lora_layers(encoder), slopes(adapter), strict=True)), seed)
    return adapter


def noise_of(adapter: Adapter, settings: NoiseSettings) -> FlatLora:
    """eps of Eq. 7 on the adapted layers."""
    sigma, schedule, steps, seed = settings.sigma, settings.schedule, settings.total_steps, settings.seed
    noise, prefix, draw = settings.noise, settings.prefix, settings.draw
    return FlatLora(adapter.model.encoder, sigma, schedule, steps, seed, noise, prefix, draw=draw)
