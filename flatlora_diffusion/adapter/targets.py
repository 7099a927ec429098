"""The layers of a denoiser that --lora_target_modules names, by the denoiser's class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class TargetSets:
    """The target sets of a denoiser class.

    Attributes:
        title: the denoiser's name in messages.
        attention, feed_forward: ends of the names of these layers.
        body: beginnings of the names of all layers that a LoRA may adapt.
    """

    title: str
    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    body: tuple[str, ...]

    def has(self, name: str, module: nn.Module, targets: str) -> bool:
        """Whether `targets`, a value of --lora_target_modules, names the layer."""
        if not name.startswith(self.body):
            return False
        if targets == "attn":
            return name.endswith(self.attention)
        if targets == "attn+ff":
            return name.endswith(self.attention + self.feed_forward)
        if targets == "all-linear":
            return isinstance(module, nn.Linear)
        return targets == "conv" or any(name == end or name.endswith(f".{end}") for end in split(targets))


_UNET = TargetSets(
    title="UNet",
    attention=("to_q", "to_k", "to_v", "to_out.0"),
    feed_forward=("ff.net.0.proj", "ff.net.2"),
    # Other tools have no names for LoRAs of conv_in, conv_out, time_embedding and add_embedding.
    body=("down_blocks.", "mid_block.", "up_blocks."),
)
_FLUX2 = TargetSets(
    title="transformer",
    # As in diffusers' training script: the image's attention, and in single blocks their feed-forward part too.
    attention=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj", "attn.to_out"),
    feed_forward=("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    # ComfyUI has no names for LoRAs of the embedders, the modulations and the output.
    body=("transformer_blocks.", "single_transformer_blocks."),
)
TARGET_SETS = {"UNet2DConditionModel": _UNET, "Flux2Transformer2DModel": _FLUX2}


def target_sets(denoiser: Any) -> TargetSets:
    """Return the target sets of a denoiser; those of a UNet for another class."""
    return TARGET_SETS.get(type(denoiser).__name__, _UNET)


def split(text: str) -> list[str]:
    """Split a comma-separated setting."""
    return [part.strip() for part in text.split(",") if part.strip()]
