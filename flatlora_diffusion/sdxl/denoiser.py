"""UNet and trained text encoders as one module for DDP: tokens in, noise prediction out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


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


def denoiser_of(unet: UNet2DConditionModel, text_encoders: Sequence[nn.Module], clip_skip: int | None) -> nn.Module:
    """Return the UNet, or a `Denoiser` if text encoders are trained."""
    return Denoiser(unet, text_encoders, clip_skip) if text_encoders else unet


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
