"""The sizes of a base by its config files, and its models on the meta device.

A base that is not on disk is taken for SDXL. Torch is imported only to create a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatlora_diffusion.config import SDXL, ModelConfig
from flatlora_diffusion.families.family import Sizes
from flatlora_diffusion.families.paths import config_file, read_settings

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


def on_meta(config: ModelConfig, part: str) -> Any:
    """Create `unet`, `text_encoder`, `text_encoder_2` or `vae` on the meta device: fp32, frozen, in eval mode."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from flatlora_diffusion.families.sdxl.vae import decode_one_by_one

    settings = part_settings(config, part)
    with torch.device("meta"):
        if part.startswith("text_encoder"):
            kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
            model = kind(CLIPTextConfig.from_dict(settings))
        else:
            model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(settings)
    if part == "vae":
        decode_one_by_one(model)
    return model.requires_grad_(False).eval()


def part_settings(config: ModelConfig, part: str) -> dict[str, Any]:
    """Return the part's config.json, of another VAE if it is given; SDXL's if the file is not on disk."""
    file = config_file(config, part)
    if file is None:
        return _SDXL[part]
    return read_settings(file)


def sizes(config: ModelConfig) -> Sizes:
    """Return the native image size, and the step of image sides: the VAE's factor times the UNet's."""
    unet, factor = part_settings(config, "unet"), vae_factor(config)
    return Sizes(int(unet["sample_size"]) * factor, int(factor * 2 ** (len(unet["block_out_channels"]) - 1)))


def known_sizes(config: ModelConfig) -> Sizes | None:
    """Return the sizes in the config files on disk; None if these are missing or invalid."""
    name = config.pretrained_model_name_or_path
    if name != SDXL and not Path(name).is_file() and config_file(config, "unet") is None:
        return None
    try:
        return sizes(config)
    except (OSError, ValueError, LookupError, TypeError):  # reported when the base is loaded
        return None


def vae_factor(config: ModelConfig) -> int:
    """Return the pixels per latent pixel in each direction."""
    return int(2 ** (len(part_settings(config, "vae")["block_out_channels"]) - 1))
