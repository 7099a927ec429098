"""FLUX.2 klein's prediction of a velocity."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.flow_matching import FlowMatching
from flatlora_diffusion.families.klein.latents import (
    from_tokens,
    image_positions,
    text_positions,
    to_tokens,
)

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class KleinObjective(FlowMatching):
    """Flow matching by FLUX.2 klein's transformer."""

    def velocity(self, model: nn.Module, noisy: Tensor, levels: Tensor, batch: Batch) -> Tensor:
        return velocity(model, noisy, levels, batch.prompts["prompt_embeds"], len(self.levels))


def velocity(model: nn.Module, latents: Tensor, levels: Tensor, prompt_embeds: Tensor, count: int = 1000) -> Tensor:
    """Predict the velocity at noisy latents (B, 4C, h, w) with noise levels (B,); `count` is that of training."""
    height, width = latents.shape[-2:]
    device, dtype = latents.device, prompt_embeds.dtype
    # With latents in half precision the model would round the timesteps too.
    is_half = dtype in _HALF and device.type != "meta"
    with torch.autocast(device.type, dtype) if is_half else nullcontext():
        tokens = model(
            hidden_states=to_tokens(latents),
            timestep=levels * count / 1000,
            guidance=None,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_positions(prompt_embeds.shape[1], device),
            img_ids=image_positions(height, width, device),
            return_dict=False,
        )[0]
    return from_tokens(tokens, height, width)


class Velocity(nn.Module):
    """The transformer as a function of noisy latents, noise levels and prompt embeddings."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, levels: Tensor, prompt_embeds: Tensor) -> Tensor:
        return velocity(self.transformer, latents, levels, prompt_embeds)
