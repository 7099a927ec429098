"""Flat-LoRA for SDXL: LoRAs of a style, trained at randomly perturbed base weights; plain LoRA and rivals too."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatlora_diffusion.config import ConfigError, LandscapeConfig, TrainConfig
    from flatlora_diffusion.flatness.peft_models import peft_flatness
    from flatlora_diffusion.method.flat_lora import FlatLora
    from flatlora_diffusion.other_trainers.transformers_trainer import FlatLoraCallback
    from flatlora_diffusion.storage.versions import __version__
    from flatlora_diffusion.training.trainer import train

__all__ = [
    "ConfigError",
    "FlatLora",
    "FlatLoraCallback",
    "LandscapeConfig",
    "TrainConfig",
    "__version__",
    "peft_flatness",
    "train",
]

_HOME = {
    "ConfigError": "config",
    "LandscapeConfig": "config",
    "TrainConfig": "config",
    "FlatLora": "method.flat_lora",
    "FlatLoraCallback": "other_trainers.transformers_trainer",
    "peft_flatness": "flatness.peft_models",
    "train": "training.trainer",
    "__version__": "storage.versions",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `--help` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'flatlora_diffusion' has no attribute {name!r}")
    return getattr(import_module(f"flatlora_diffusion.{_HOME[name]}"), name)
