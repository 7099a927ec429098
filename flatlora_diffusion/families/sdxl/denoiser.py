"""UNet and trained text encoders as one module for DDP: tokens in, noise prediction out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from flatlora_diffusion.config import TEXT_PARTS, ModelConfig
from flatlora_diffusion.families.sdxl.shapes import TOKENS, part_settings


class Denoiser(nn.Module):
    """The UNet with both text encoders in front of it, conditioned as StableDiffusionXLPipeline does."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoders: Sequence[nn.Module], clip_skip: int | None = None
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoders = nn.ModuleList(text_encoders)
        self.clip_skip = clip_skip

    def forward(
        self, sample: Tensor, timesteps: Tensor, input_ids: Tensor, caption_mask: Tensor, add_time_ids: Tensor
    ) -> Tensor:
        """Predict from noisy latents (B, 4, h, w) and tokens (B, 2, 77); mask 0 gives zero embeddings."""
        prompt_embeds, pooled = embed_tokens(self.text_encoders, input_ids, self.clip_skip)
        dtype: torch.dtype = self.unet.conv_in.weight.dtype
        added = {"text_embeds": pooled.to(dtype) * caption_mask[:, None].to(dtype), "time_ids": add_time_ids}
        prompts = prompt_embeds.to(dtype) * caption_mask[:, None, None].to(dtype)
        output: Tensor = self.unet(sample.to(dtype), timesteps, prompts, added_cond_kwargs=added, return_dict=False)[0]
        return output


class Conditioned(nn.Module):
    """The UNet with the conditioning of SDXL as positional arguments."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timesteps: Tensor, prompts: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": time_ids}
        output: Tensor = self.unet(sample, timesteps, prompts, added_cond_kwargs=added, return_dict=False)[0]
        return output


def denoiser_of(unet: UNet2DConditionModel, text_encoders: Sequence[nn.Module], clip_skip: int | None) -> nn.Module:
    """Return the UNet, or a `Denoiser` if text encoders are trained."""
    return Denoiser(unet, text_encoders, clip_skip) if text_encoders else unet


def meta_inputs(
    config: ModelConfig, images: int, shape: Sequence[int], dtype: torch.dtype, trains_text: bool
) -> tuple[Tensor, ...]:
    """Return the inputs of `Conditioned`, or of `Denoiser`, for latents of `shape` on the meta device."""
    settings = part_settings(config, "unet")
    with torch.device("meta"):
        sample = torch.empty(images, *shape, dtype=dtype)
        timesteps, time_ids = torch.empty(images, dtype=torch.long), torch.empty(images, 6)
        if trains_text:
            ids = torch.empty(images, len(TEXT_PARTS), TOKENS, dtype=torch.long)
            return sample, timesteps, ids, torch.empty(images), time_ids
        prompts = torch.empty(images, TOKENS, settings["cross_attention_dim"], dtype=dtype)
        width = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        return sample, timesteps, prompts, torch.empty(images, width, dtype=dtype), time_ids


def embed_tokens(
    text_encoders: Sequence[Any] | nn.ModuleList, input_ids: Tensor, clip_skip: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return prompt embeddings (B, 77, D) of both encoders and the pooled embeddings (B, P) of the second.

    Args:
        input_ids: tokens, (B, 2, 77).
        clip_skip: layers to skip beyond SDXL's penultimate layer.
    """
    layer = -2 if clip_skip is None else -(clip_skip + 2)
    hidden, pooled = [], None
    for encoder, ids in zip(text_encoders, input_ids.unbind(dim=1), strict=True):
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[layer])
        pooled = output[0]
    assert pooled is not None
    return torch.cat(hidden, dim=-1), pooled
