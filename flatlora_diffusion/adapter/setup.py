"""Add the trained parts to a pipeline: a LoRA on the denoiser and optionally text encoders, and new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.adapter.delta import Updates, shared_path
from flatlora_diffusion.adapter.layers import ADAPTER, denoiser_of, lora_layers, parts_of
from flatlora_diffusion.adapter.lora import (
    add_lora,
    start_magnitudes,
    trainable_parameters,
)
from flatlora_diffusion.adapter.new_tokens import add_tokens
from flatlora_diffusion.adapter.svd_start import anchors
from flatlora_diffusion.config import AdapterConfig, ConfigError, TrainConfig


def adapt(pipeline: Any, config: TrainConfig) -> dict[str, list[str]]:
    """Add LoRA layers in fp32 and new tokens, and set training mode and gradient checkpointing.

    Returns:
        The new tokens by placeholder.
    """
    assert config.run.seed is not None
    adapter, seed = config.adapter, config.run.seed
    init_seed = seed if adapter.lora_init_seed is None else adapter.lora_init_seed
    models = {part: getattr(pipeline, part) for part in parts_of(pipeline)}
    denoiser, text_encoders = models.pop(denoiser_of(pipeline)), models
    trained = text_encoders if adapter.train_text_encoder else None
    add_lora(denoiser, adapter, init_seed, trained, config.model.clip_skip)
    tokens = add_tokens(pipeline, config.tokens, seed) if config.tokens.train_text_encoder_ti else {}
    trained_encoders = list(text_encoders.values()) if config.trains_text else []
    for model in (denoiser, *trained_encoders):
        model.train()
    if config.optim.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        for encoder in trained_encoders:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return tokens


@torch.no_grad()
def load_initial(pipeline: Any, updates: Updates, magnitudes: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load the factors and scales of another LoRA, and DoRA's magnitudes, into the pipeline's new LoRA.

    All are by module path, by part. Raises ConfigError if ranks, layers or DoRA do not fit.
    """
    for part, layers in updates.items():
        own_layers = {shared_path(part, name): layer for name, layer in lora_layers(getattr(pipeline, part)).items()}
        unknown = sorted(set(layers) - set(own_layers))
        if unknown:
            raise ConfigError(
                f"init_lora has {len(unknown)} layer(s) of the {part} that this run does not train, such as "
                f"{unknown[0]}; set --lora_target_modules, --lora_unet_blocks or --train_text_encoder as for that LoRA"
            )
        for name, (down, up, scale) in layers.items():
            layer = own_layers[name]
            rank = layer.r[ADAPTER]
            if len(down) < rank or bool(down[rank:].any()):
                raise ConfigError(f"rank={rank}, but init_lora has rank {len(down)} at {name}; use --rank {len(down)}")
            layer.lora_A[ADAPTER].weight.copy_(down[:rank])
            layer.lora_B[ADAPTER].weight.copy_(up[:, :rank] * (scale / layer.scaling[ADAPTER]))
        start_magnitudes(getattr(pipeline, part))  # a plain LoRA has none
        for name, magnitude in magnitudes.get(part, {}).items():
            if ADAPTER not in own_layers[name].lora_magnitude_vector:
                raise ConfigError("init_lora is a DoRA, whose magnitudes a plain LoRA lacks; set --use_dora")
            own_layers[name].lora_magnitude_vector[ADAPTER].weight.copy_(magnitude)


def adapted_models(pipeline: Any, config: AdapterConfig) -> dict[str, nn.Module]:
    """The models with a LoRA by part of the pipeline."""
    parts = parts_of(pipeline) if config.train_text_encoder else (denoiser_of(pipeline),)
    return {part: getattr(pipeline, part) for part in parts}


def trainable_by_part(pipeline: Any) -> dict[str, nn.Parameter]:
    """All trained parameters, named PART.PARAMETER."""
    return {
        f"{part}.{name}": parameter
        for part in parts_of(pipeline)
        for name, parameter in trainable_parameters(getattr(pipeline, part)).items()
    }


def anchors_by_part(pipeline: Any) -> dict[str, Tensor]:
    """The frozen A0 and B0 of PiSSA and LoRA-GA, named PART.PARAMETER."""
    return {
        f"{part}.{name}": weight
        for part in parts_of(pipeline)
        for name, weight in anchors(getattr(pipeline, part)).items()
    }
