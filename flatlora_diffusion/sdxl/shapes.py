"""The sizes of a base by its config files, and its models on the meta device.

A base that is not on disk is taken for SDXL. Torch is imported only to create a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from flatlora_diffusion.config import SAMPLES, SDXL, TINY, ConfigError, ModelConfig

TOKENS = 77  # of a prompt
# The sizes of stabilityai/stable-diffusion-xl-base-1.0.
_SDXL: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 1024,
    },
}


def base_path(name_or_path: str) -> str:
    """Return the folder, file or hub id of a base; `tiny` is the base that ships with this program."""
    return str(SAMPLES / "tiny_sdxl") if name_or_path == TINY else name_or_path


def on_meta(config: ModelConfig, part: str) -> Any:
    """Create `unet`, `text_encoder`, `text_encoder_2` or `vae` on the meta device: fp32, frozen, in eval mode."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = part_settings(config, part)
    with torch.device("meta"):
        if part.startswith("text_encoder"):
            kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
            model = kind(CLIPTextConfig.from_dict(settings))
        else:
            model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(settings)
    return model.requires_grad_(False).eval()


def part_settings(config: ModelConfig, part: str) -> dict[str, Any]:
    """Return the part's config.json, of another VAE if it is given; SDXL's if the file is not on disk."""
    file = config_file(config, part)
    if file is None:
        return _SDXL[part]
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


class Sizes(NamedTuple):
    """A base's native image size in pixels, and the step that image sides must be a multiple of."""

    native: int
    step: int


def known_sizes(config: ModelConfig) -> Sizes | None:
    """Return the sizes in the config files on disk; None if these are missing or invalid."""
    name = config.pretrained_model_name_or_path
    if name != SDXL and not Path(name).is_file() and config_file(config, "unet") is None:
        return None
    try:
        return Sizes(native_size(config), size_step(config))
    except (OSError, ValueError, LookupError, TypeError):  # reported when the base is loaded
        return None


def config_file(config: ModelConfig, part: str) -> Path | None:
    """Return the part's config.json in the base's folder or in the hub's cache; None if it is in neither."""
    path, name, revision = config.single_file_config, f"{part}/config.json", config.revision
    path = path or base_path(config.pretrained_model_name_or_path)
    if part == "vae" and config.pretrained_vae_model_name_or_path is not None:
        path, name, revision = config.pretrained_vae_model_name_or_path, "config.json", None
    file = Path(path, name)
    if file.is_file():
        return file
    try:
        cached = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:  # a file path, not a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def vae_factor(config: ModelConfig) -> int:
    """Return the pixels per latent pixel in each direction."""
    return int(2 ** (len(part_settings(config, "vae")["block_out_channels"]) - 1))


def native_size(config: ModelConfig) -> int:
    """Return the base's native image size in pixels."""
    return int(part_settings(config, "unet")["sample_size"]) * vae_factor(config)


def size_step(config: ModelConfig) -> int:
    """Return the step of image sides: the VAE's factor times the UNet's."""
    return int(vae_factor(config) * 2 ** (len(part_settings(config, "unet")["block_out_channels"]) - 1))


def checked_size(resolution: int, step: int) -> int:
    """Return `resolution`. Raises ConfigError if it is not a multiple of the base's `step`."""
    if resolution % step:
        nearest = max(1, round(resolution / step)) * step
        raise ConfigError(
            f"resolution={resolution} must be a multiple of {step} for this base; {nearest} is the nearest"
        )
    return resolution


def check_resolution(config: ModelConfig, resolution: int | None) -> None:
    """Raise ConfigError as `checked_size` does, if the base's sizes are known before it is loaded."""
    sizes = known_sizes(config)
    if resolution is not None and sizes is not None:
        checked_size(resolution, sizes.step)
