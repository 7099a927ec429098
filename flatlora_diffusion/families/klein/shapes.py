"""The sizes of a base by its config files, and its models on the meta device.

A base that is not on disk is taken for FLUX.2 klein 4B. Torch is imported only to create a model.
"""

from __future__ import annotations

from typing import Any

from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.families.family import Sizes
from flatlora_diffusion.families.paths import base_file, read_settings

TOKENS, SIDE = 512, 1024  # of a prompt, and pixels of an image
# The sizes of black-forest-labs/FLUX.2-klein-base-4B; the VAE's are the defaults of diffusers.
_KLEIN_4B: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "text_encoder": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "tokenizer": {"model_max_length": 131072},
    "vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 32, "sample_size": SIDE},
}


def on_meta(config: ModelConfig, part: str) -> Any:
    """Create `transformer`, `text_encoder` or `vae` on the meta device: fp32, frozen, in eval mode."""
    import torch
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from flatlora_diffusion.families.klein.latents import decode_one_by_one

    settings = part_settings(config, part)
    with torch.device("meta"):
        if part == "text_encoder":
            model = Qwen3ForCausalLM(Qwen3Config.from_dict(settings))
        else:
            model = {"transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2}[part].from_config(settings)
    if part == "vae":
        decode_one_by_one(model)
    return model.requires_grad_(False).eval()


def part_settings(config: ModelConfig, part: str) -> dict[str, Any]:
    """Return the part's config.json, or the tokenizer's; that of klein 4B if the file is not on disk."""
    file = base_file(config, "tokenizer/tokenizer_config.json" if part == "tokenizer" else f"{part}/config.json")
    if file is None:
        return _KLEIN_4B[part]
    return read_settings(file)


def sizes(config: ModelConfig) -> Sizes:
    """Return the native image size, and the step of image sides: a patch of 2 x 2 latent pixels of the VAE."""
    vae = part_settings(config, "vae")
    return Sizes(native_size(vae), 2 ** len(vae["block_out_channels"]))


def known_sizes(config: ModelConfig) -> Sizes | None:
    """Return the sizes in the config files on disk; None if these are missing or invalid."""
    if base_file(config, "vae/config.json") is None:
        return None
    try:
        return sizes(config)
    except (OSError, ValueError, LookupError, TypeError):  # reported when the base is loaded
        return None


def latent_shape(config: ModelConfig, resolution: int) -> tuple[int, int, int]:
    """Return (4C, h, w) of the latents of an image of `resolution` pixels."""
    side = resolution // sizes(config).step
    return int(part_settings(config, "transformer")["in_channels"]), side, side


def prompt_shape(config: ModelConfig) -> tuple[int, int]:
    """Return (L, 3D) of the embeddings of a prompt."""
    width = part_settings(config, "transformer")["joint_attention_dim"]
    return prompt_length(part_settings(config, "tokenizer")["model_max_length"]), int(width)


def prompt_length(longest: float) -> int:
    """Return the length that prompts are padded to: 512, or the tokenizer's `longest` if it is shorter."""
    return int(min(TOKENS, longest))


def native_size(vae: Any) -> int:
    """Return the image size in pixels that a base with this config of the VAE was trained at."""
    size = vae["sample_size"]
    return int(size[0] if isinstance(size, list | tuple) else size)
