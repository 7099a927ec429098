"""Checks of a base, a VAE and an initial LoRA before a training is queued, without loading weights."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.families.registry import check_kind, family_of
from flatlora_diffusion.storage.model_paths import check_models


def check_start(config: TrainConfig) -> None:
    """Raise ConfigError for an unsupported base, VAE, LoRA or setting, by paths and headers only.

    Names on the hub are not checked.
    """
    # Imports torch and diffusers, which takes seconds.
    from flatlora_diffusion.lora_files.paths import lora_path
    from flatlora_diffusion.lora_files.safe_reading import read_header

    check_models(config.model, config.adapter.init_lora)
    if config.adapter.init_lora is not None:
        read_header(lora_path(Path(config.adapter.init_lora)))
    check_kind(config.model)
    family = family_of(config.model)
    family.check_settings(config)
    family.check_source(config.model)
