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
        self, sample: Tensor, timesteps: Tensor, input_ids: Tensor, kept: Tensor, add_time_ids: Tensor
    ) -> Tensor:
        """Predict from noisy latents (B, 4, h, w) and tokens (B, 2, 77); rows with `kept` 0 get zero embeddings."""
        prompt_embeds, pooled = embed_tokens(self.text_encoders, input_ids, self.clip_skip)
        dtype: torch.dtype = self.unet.conv_in.weight.dtype
        added = {"text_embeds": pooled.to(dtype) * kept[:, None].to(dtype), "time_ids": add_time_ids}
        prompts = prompt_embeds.to(dtype) * kept[:, None, None].to(dtype)
        output: Tensor = self.unet(sample.to(dtype), timesteps, prompts, added_cond_kwargs=added, return_dict=False)[0]
        return output


def denoiser_of(unet: UNet2DConditionModel, text_encoders: Sequence[nn.Module], clip_skip: int | None) -> nn.Module:
    """What the loss calls: the UNet, with the text encoders that are trained in front of it, if there are any."""
    return Denoiser(unet, text_encoders, clip_skip) if text_encoders else unet


def embed_tokens(
    text_encoders: Sequence[Any] | nn.ModuleList, input_ids: Tensor, clip_skip: int | None = None
) -> tuple[Tensor, Tensor]:
    """Prompt embeddings (B, 77, D) of both encoders' penultimate layer, and the second's pooled ones (B, P).

    `input_ids` (B, 2, 77); `clip_skip` goes that many layers further back.
    """
    layer = -2 if clip_skip is None else -(clip_skip + 2)
    hidden, pooled = [], None
    for encoder, ids in zip(text_encoders, input_ids.unbind(dim=1), strict=True):
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[layer])
        pooled = output[0]
    assert pooled is not None
    return torch.cat(hidden, dim=-1), pooled
