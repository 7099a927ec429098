"""The base's parts: a transformer in FLUX.2 klein's layout, and tiny SDXL's VAE in the frame of klein's."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor, nn

from samples.tiny_klein.recipe.text import TAPS, WIDTH, build_text_encoder, embeddings

HEADS, HEAD_DIM = 8, 32
DOUBLE, SINGLE = 2, 4  # blocks with streams of their own for image and text, and blocks with one stream
CHANNELS = 16  # four latent channels of 2 x 2 pixels
SIDE = 8  # tokens along a side of a 64-pixel icon


def build_transformer() -> Flux2Transformer2DModel:
    """A randomly initialized transformer that at first predicts zeros; call under a fixed seed."""
    transformer = Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=len(TAPS) * WIDTH,
        axes_dims_rope=(4, 12, 12, 4),
        guidance_embeds=False,
    )
    modulations = [
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    ]
    for zero in (
        *(modulation.linear for modulation in modulations),
        transformer.norm_out.linear,
        transformer.proj_out,
    ):
        nn.init.zeros_(zero.weight)
    return transformer


class Base(nn.Module):
    """Text encoder and transformer, run as Flux2KleinPipeline runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder()
        self.transformer = build_transformer()

    def forward(self, ids: Tensor, mask: Tensor, latents: Tensor, sigmas: Tensor) -> Tensor:
        """Predict noise minus image for noised `latents`, (B, 16, 8, 8), at `sigmas`, (B,), from 0 to 1."""
        texts = embeddings(self.text_encoder, ids, mask)
        predicted = self.transformer(
            hidden_states=Flux2KleinPipeline._pack_latents(latents),
            encoder_hidden_states=texts,
            timestep=sigmas,
            img_ids=Flux2KleinPipeline._prepare_latent_ids(latents[:1]),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(texts[:1]),
            return_dict=False,
        )[0]
        return predicted.transpose(1, 2).unflatten(2, latents.shape[2:])


def build_vae(tiny_sdxl: Path) -> AutoencoderKLFlux2:
    """The VAE of the tiny SDXL base in klein's class, with unit batch statistics."""
    source = AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae", dtype=torch.float32)
    names = (
        "down_block_types",
        "up_block_types",
        "block_out_channels",
        "layers_per_block",
        "latent_channels",
        "norm_num_groups",
        "sample_size",
    )
    vae = AutoencoderKLFlux2(**{name: source.config[name] for name in names})
    vae.load_state_dict(source.state_dict() | {f"bn.{name}": value for name, value in vae.bn.state_dict().items()})
    return vae.eval()
