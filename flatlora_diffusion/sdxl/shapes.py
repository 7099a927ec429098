"""The base's four models by their config files: their sizes, and all shapes without weights on the meta device.

A base that is not on disk counts as SDXL. Torch is imported only where a model is built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from flatlora_diffusion.config import SAMPLES, SDXL, TINY, ConfigError, ModelConfig

TOKENS = 77  # of a prompt, as CLIP reads it
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
    """The folder, file or hub id behind `--pretrained_model_name_or_path`; `tiny` is the base that ships with us."""
    return str(SAMPLES / "tiny_sdxl") if name_or_path == TINY else name_or_path


def on_meta(config: ModelConfig, part: str) -> Any:
    """The base's `unet`, `text_encoder`, `text_encoder_2` or `vae` on the meta device, fp32, frozen, in eval mode."""
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
    """The part's config.json, of the VAE that of another one, where it is given; SDXL's own where there is none."""
    file = own_config(config, part)
    if file is None:
        return _SDXL[part]
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


class Sizes(NamedTuple):
    """A base's own image size in pixels, and the step that image sides must be a multiple of."""

    own: int
    step: int


def known_sizes(config: ModelConfig) -> Sizes | None:
    """What the config files on this disk say; None for a hub id that is not downloaded, and for files of no base."""
    name = config.pretrained_model_name_or_path
    if name != SDXL and not Path(name).is_file() and own_config(config, "unet") is None:
        return None
    try:
        return Sizes(own_size(config), size_step(config))
    except (OSError, ValueError, LookupError, TypeError):  # told in full when the base is loaded
        return None


def own_config(config: ModelConfig, part: str) -> Path | None:
    """The part's config.json in the base's folder or in the hub's cache; None for a base that is in neither."""
    path, name, revision = config.single_file_config, f"{part}/config.json", config.revision
    path = path or base_path(config.pretrained_model_name_or_path)
    if part == "vae" and config.pretrained_vae_model_name_or_path is not None:
        path, name, revision = config.pretrained_vae_model_name_or_path, "config.json", None
    file = Path(path, name)
    if file.is_file():
        return file
    try:
        cached = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:  # the path of a file, not a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def vae_factor(config: ModelConfig) -> int:
    """Pixels per latent pixel, in each direction."""
    return int(2 ** (len(part_settings(config, "vae")["block_out_channels"]) - 1))


def own_size(config: ModelConfig) -> int:
    """The base's own size in pixels, from its configs."""
    return int(part_settings(config, "unet")["sample_size"]) * vae_factor(config)


def size_step(config: ModelConfig) -> int:
    """Image sides are a multiple of this: the VAE's factor times the UNet's."""
    return int(vae_factor(config) * 2 ** (len(part_settings(config, "unet")["block_out_channels"]) - 1))


def checked_size(wanted: int, step: int) -> int:
    """`wanted` pixels. Raises ConfigError for an image size that is no multiple of the base's `step`."""
    if wanted % step:
        near = max(1, round(wanted / step)) * step
        raise ConfigError(f"resolution={wanted} must be a multiple of {step} for this base; {near} is the nearest")
    return wanted


def check_resolution(config: ModelConfig, wanted: int | None) -> None:
    """Raises ConfigError as `checked_size`, for a base whose sizes are known before it is loaded."""
    sizes = known_sizes(config)
    if wanted is not None and sizes is not None:
        checked_size(wanted, sizes.step)
