"""A FLUX.2 klein pipeline of random weights: the real classes at the smallest useful size."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

RESOLUTION, TOKENS, WIDTH = 32, 64, 8
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tiny_random_klein(is_distilled: bool = False, channels: int = 4, levels: int = 3) -> Flux2KleinPipeline:
    """Create it: 32-pixel images, latents of 4 x 8 x 8 and 16 x 4 x 4 in patches, 12 adapted layers, 64 tokens.

    FLUX.2's own VAE has 32 `channels` and 4 `levels`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(8,) * levels,
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=RESOLUTION,
        )
        vae.bn.running_mean.normal_(0, 0.2)
        vae.bn.running_var.uniform_(0.5, 2)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * channels,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=320,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=28,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=4,
                max_position_embeddings=TOKENS,
                tie_word_embeddings=True,
            )
        )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_tokenizer(),
        transformer=transformer,
        is_distilled=is_distilled,
    )


def save_tiny_random_klein(folder: Path, is_distilled: bool = False) -> Path:
    """Write the pipeline of `tiny_random_klein`."""
    tiny_random_klein(is_distilled).save_pretrained(folder)
    return folder


def _tokenizer() -> Qwen2TokenizerFast:
    """Create a tokenizer of single bytes with Qwen3's special tokens and chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2TokenizerFast(
        vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[], model_max_length=TOKENS
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
