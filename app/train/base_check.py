"""Checks of a base, a VAE and an initial LoRA before a training is queued, without loading weights."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.config import ConfigError, ModelConfig, TrainConfig
from flatlora_diffusion.storage.model_paths import check_models

from ..process.json_file import read_json


def check_start(config: TrainConfig) -> None:
    """Raises ConfigError for anything but an SDXL base, VAE or LoRA, judged by paths and headers.

    Names on the hub are not checked.
    """
    from flatlora_diffusion.lora_files.paths import lora_path
    from flatlora_diffusion.lora_files.safe_reading import read_header

    check_models(config.model, config.adapter.init_lora)
    if config.adapter.init_lora is not None:
        read_header(lora_path(Path(config.adapter.init_lora)))
    _check_base(config.model)


def _check_base(model: ModelConfig) -> None:
    from flatlora_diffusion.sdxl.detect import check_channels
    from flatlora_diffusion.sdxl.loading import base_path, check_source  # imports diffusers, which takes seconds
    from flatlora_diffusion.sdxl.shapes import part_settings

    check_source(model)
    path = Path(base_path(model.pretrained_model_name_or_path))
    if not path.is_dir():
        return
    parts = read_json(path / "model_index.json")
    what = f"pretrained_model_name_or_path={model.pretrained_model_name_or_path!r}"
    for part, of_what in (("text_encoder_2", "Stable Diffusion 1 or 2"), ("text_encoder", "SDXL's refiner")):
        if not any(parts.get(part) or ()):
            raise ConfigError(f"{what} has no {part}, as {of_what}; choose an SDXL base")
    unet, vae = part_settings(model, "unet"), part_settings(model, "vae")
    check_channels(unet.get("in_channels", 4), vae.get("latent_channels", 4), what)
