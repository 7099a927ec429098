"""A base with random weights in the shapes of a real base, to test a device without a download."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from transformers import Qwen2TokenizerFast

from flatlora_diffusion.config import INCLUDED_BASES, TINY_KLEIN, ModelConfig
from flatlora_diffusion.families.klein.pipeline import Klein, wrap_pipeline
from flatlora_diffusion.families.klein.shapes import on_meta
from flatlora_diffusion.families.paths import base_file
from flatlora_diffusion.families.random_weights import random_weights


def random_klein(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Klein:
    """Create a base with the shapes and the tokenizer of the folder in `config`, or with those of klein 4B.

    Without a folder the tokenizer is that of the tiny klein. Weights preserve the variance of their inputs; the
    VAE is fp32.
    """
    name = "tokenizer/tokenizer.json"
    tokenizer = base_file(config, name) or INCLUDED_BASES[TINY_KLEIN] / name
    text_encoder = random_weights(on_meta(config, "text_encoder"), device, dtype)
    rotary = text_encoder.model.rotary_emb
    text_encoder.model.rotary_emb = type(rotary)(text_encoder.config).to(device)  # its frequencies are no weights
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=random_weights(on_meta(config, "vae"), device, torch.float32),
        text_encoder=text_encoder,
        tokenizer=Qwen2TokenizerFast.from_pretrained(tokenizer.parent),
        transformer=random_weights(on_meta(config, "transformer"), device, dtype),
    )
    return wrap_pipeline(pipeline)
