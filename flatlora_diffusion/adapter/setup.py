"""What of a base is trained: a LoRA on its UNet and, if asked for, on its text encoders, and new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.adapter.delta import PARTS, Updates, shared_path
from flatlora_diffusion.adapter.full import save_merged
from flatlora_diffusion.adapter.layers import ADAPTER, lora_layers
from flatlora_diffusion.adapter.lora import (
    add_lora,
    start_magnitudes,
    trainable_parameters,
)
from flatlora_diffusion.adapter.new_tokens import add_tokens, save_embeddings
from flatlora_diffusion.adapter.svd_start import anchors
from flatlora_diffusion.config import TEXT_PARTS, AdapterConfig, ConfigError, TrainConfig


def adapt(pipeline: Any, config: TrainConfig) -> dict[str, list[str]]:
    """Add what is trained, LoRAs in fp32 and new tokens, and have it ready to be trained.

    Returns the new tokens by placeholder.
    """
    assert config.run.seed is not None
    adapter, seed = config.adapter, config.run.seed
    init_seed = seed if adapter.lora_init_seed is None else adapter.lora_init_seed
    unet, text_encoders = pipeline.unet, {part: getattr(pipeline, part) for part in TEXT_PARTS}
    add_lora(unet, adapter, init_seed, text_encoders if adapter.train_text_encoder else None, config.model.clip_skip)
    tokens = add_tokens(pipeline, config.tokens, seed) if config.tokens.train_text_encoder_ti else {}
    trained_encoders = list(text_encoders.values()) if config.trains_text else []
    for model in (unet, *trained_encoders):
        model.train()
    if config.optim.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        for encoder in trained_encoders:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return tokens


@torch.no_grad()
def start_from(pipeline: Any, updates: Updates, magnitudes: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Let the pipeline's new LoRA start from `updates` and, for a DoRA, `magnitudes`.

    Raises ConfigError when ranks, layers or DoRA do not fit.
    """
    for part, layers in updates.items():
        mine = {shared_path(part, name): layer for name, layer in lora_layers(getattr(pipeline, part)).items()}
        strange = sorted(set(layers) - set(mine))
        if strange:
            raise ConfigError(
                f"init_lora adapts {len(strange)} layer(s) of the {part} that this run does not train, such as "
                f"{strange[0]}; set --lora_target_modules, --lora_unet_blocks or --train_text_encoder as it was made"
            )
        for name, (down, up, scale) in layers.items():
            layer = mine[name]
            kept = layer.r[ADAPTER]
            if len(down) < kept or bool(down[kept:].any()):
                raise ConfigError(f"rank={kept}, but init_lora has rank {len(down)} at {name}; use --rank {len(down)}")
            layer.lora_A[ADAPTER].weight.copy_(down[:kept])
            layer.lora_B[ADAPTER].weight.copy_(up[:, :kept] * (scale / layer.scaling[ADAPTER]))
        start_magnitudes(getattr(pipeline, part))  # a plain LoRA has none of its own
        for name, magnitude in magnitudes.get(part, {}).items():
            if ADAPTER not in mine[name].lora_magnitude_vector:
                raise ConfigError("init_lora is a DoRA, whose magnitudes this run would lose; set --use_dora")
            mine[name].lora_magnitude_vector[ADAPTER].weight.copy_(magnitude)


def adapted_models(pipeline: Any, config: AdapterConfig) -> dict[str, nn.Module]:
    """The models with a LoRA, by part."""
    parts = ("unet", *(TEXT_PARTS if config.train_text_encoder else ()))
    return {part: getattr(pipeline, part) for part in parts}


def trainable_of(pipeline: Any) -> dict[str, nn.Parameter]:
    """What is trained, by part and name."""
    return {
        f"{part}.{name}": parameter
        for part in PARTS
        for name, parameter in trainable_parameters(getattr(pipeline, part)).items()
    }


def anchors_of(pipeline: Any) -> dict[str, Tensor]:
    """A0 and B0 of what starts away from zero, by part and name; they are never trained."""
    return {f"{part}.{name}": weight for part in PARTS for name, weight in anchors(getattr(pipeline, part)).items()}


def save_beside(pipeline: Any, folder: Path, merged: Path | None = None) -> None:
    """Write what a LoRA file cannot hold: new tokens' embeddings into `folder`, and the whole of a full fine-tuning.

    The latter goes into the folder `merged`, if one is given.
    """
    if merged is not None:
        save_merged(pipeline, merged)
    save_embeddings(pipeline, folder)
