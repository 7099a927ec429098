"""An SDXL-format pipeline of random weights, the real classes at the smallest useful size: half a second to build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flatlora_diffusion.families.paths import base_path

RESOLUTION = 32


def save_tiny_random_sdxl(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write the pipeline: 32-pixel images, latents of 8 x 8, text encoders of widths 16 and 24, 40 adapted layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 8, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=RESOLUTION,
                scaling_factor=0.5,
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[0.5, 1.5, 1.0, 2.0],
            ),
            text_encoder=CLIPTextModel(_text_config(16)),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(24)),
            tokenizer=CLIPTokenizer.from_pretrained(Path(base_path("tiny")) / "tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(Path(base_path("tiny")) / "tokenizer_2"),
            unet=UNet2DConditionModel(
                sample_size=RESOLUTION // 4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(8, 16, 16),
                layers_per_block=1,
                attention_head_dim=2,
                cross_attention_dim=16 + 24,
                norm_num_groups=4,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=24 + 6 * 4,
                use_linear_projection=True,
            ),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                timestep_spacing="leading",
                prediction_type=prediction_type,
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def save_icons(folder: Path, count: int = 3) -> Path:
    """`count` different small pictures with captions beside them."""
    folder.mkdir(parents=True)
    for index in range(count):
        image = Image.new("RGB", (48, 40 + index), "white")
        ImageDraw.Draw(image).ellipse((4, 6, 20 + 8 * index, 36), fill=(200 - 60 * index, 40 + 50 * index, 90))
        image.save(folder / f"icon-{index}.png")
        (folder / f"icon-{index}.txt").write_text(f"an icon of thing {index}", encoding="utf-8")
    return folder


def _text_config(width: int) -> CLIPTextConfig:
    options: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPTextConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=77,
        **options,
    )
