"""Add LoRA layers to the denoiser and optionally the text encoders, initialized from a seed and kept in fp32.

`TARGET_SETS` has the layers that --lora_target_modules names, by the denoiser's class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor, nn

from flatlora_diffusion.adapter.adalora import adalora_config, initialize
from flatlora_diffusion.adapter.layers import ADAPTER, base_weight, check_adaptable, lora_layers
from flatlora_diffusion.config import ADAPTERS, AdapterConfig, ConfigError, function_at
from flatlora_diffusion.storage.rng import generator


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


TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
BLORA_BLOCKS = "up_blocks.0.attentions.0,up_blocks.0.attentions.1"


def add_lora(
    denoiser: Any,
    config: AdapterConfig,
    seed: int,
    text_encoders: Mapping[str, Any] | None = None,
    clip_skip: int | None = None,
) -> None:
    """Add a LoRA to the chosen layers of the denoiser and to the attention of the text encoders, given by part.

    A ~ N(0, 1/rank^2) is a function of (seed, part, layer), B = 0, both fp32; some adapters initialize otherwise.

    Args:
        clip_skip: layers of the first text encoder that the run skips.

    Raises:
        ConfigError: the settings match no layer, or a layer that cannot have this adapter; nothing is added.
    """
    for model, lora, path in planned_loras(denoiser, config, text_encoders, clip_skip):
        _add_adapter(model, lora, seed, path)
        if (start := ADAPTERS[config.adapter].start) is not None:
            function_at(start)(model, lora, config, seed)


def planned_loras(
    denoiser: Any,
    config: AdapterConfig,
    text_encoders: Mapping[str, Any] | None = None,
    clip_skip: int | None = None,
) -> list[tuple[Any, LoraConfig, str]]:
    """The models that `add_lora` changes, each with its PEFT config and the prefix of its layers' names.

    Takes the same arguments and raises the same errors as `add_lora`; models on the meta device will do.
    """
    loras = [(denoiser, _denoiser_lora_config(denoiser, config), "")]
    for part, encoder in (text_encoders or {}).items():
        loras.append((encoder, _text_lora_config(encoder, config, part, clip_skip), f"{part}."))
    return loras


def _denoiser_lora_config(denoiser: Any, config: AdapterConfig) -> LoraConfig:
    targets = denoiser_targets(denoiser, config)
    ranks = _block_ranks(config.lora_block_ranks, targets)
    for name in targets:
        check_adaptable(config.adapter, name, denoiser.get_submodule(name), ranks.get(name, config.rank))
    if config.adapter == "adalora":
        return adalora_config(config.rank, config.lora_alpha, config.lora_dropout, targets)
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        init_lora_weights="gaussian",
        target_modules=targets,
        rank_pattern=ranks,
        # Without --lora_alpha each layer's alpha is its rank.
        alpha_pattern={name: float(rank) for name, rank in ranks.items()} if config.lora_alpha is None else {},
    )


def _text_lora_config(text_encoder: Any, config: AdapterConfig, part: str, clip_skip: int | None) -> LoraConfig:
    """The config for the attention of a text encoder, without DoRA: diffusers does not load its magnitudes there.

    SDXL reads the penultimate layer of the first encoder, or `clip_skip` layers before it. Layers behind that have no
    gradient and get no LoRA. Of the second encoder SDXL also reads the last layer.
    """
    unused = 1 + (clip_skip or 0) if part == "text_encoder" else 0
    count = text_encoder.config.num_hidden_layers - unused
    if count < 1:
        raise ConfigError(
            f"clip_skip={clip_skip} leaves no layer of the first text encoder to train; with --train_text_encoder "
            f"give at most {text_encoder.config.num_hidden_layers - 2}"
        )
    targets = [f"layers.{layer}.self_attn.{name}" for layer in range(count) for name in TEXT_ATTENTION]
    for name, module in text_encoder.named_modules():
        if name.endswith(tuple(targets)):
            check_adaptable(config.adapter, f"{part}.{name}", module, config.rank)
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights="gaussian",
        target_modules=targets,
    )


def denoiser_targets(denoiser: nn.Module, config: AdapterConfig) -> list[str]:
    """The module paths of the denoiser that get a LoRA. Raises ConfigError if the settings match none."""
    sets = target_sets(denoiser)
    modules = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    chosen = [name for name, module in modules.items() if sets.has(name, module, config.lora_target_modules)]
    if not chosen:
        raise ConfigError(
            f"lora_target_modules={config.lora_target_modules!r} matches no layer of the {sets.title}; "
            "use attn, attn+ff, all-linear, conv, or ends of layer names such as to_q,to_v"
        )
    blocks = BLORA_BLOCKS if config.use_blora else config.lora_unet_blocks
    if blocks is None:
        return chosen
    inside: list[str] = []
    for block in split(blocks):
        in_block = [name for name in chosen if _is_inside(name, block)]
        if not in_block:
            raise ConfigError(
                f"lora_unet_blocks: {block!r} has no layer to train; give beginnings of names such as {chosen[0]}"
            )
        inside += in_block
    return sorted(set(inside), key=chosen.index)


@torch.no_grad()
def start_magnitudes(model: nn.Module) -> None:
    """Set DoRA's magnitudes to the row norms of W + sBA in fp32; does nothing without DoRA.

    PEFT computes them in the base's dtype, which in half precision changes every row of W before the first step.
    """
    for layer in lora_layers(model).values():
        if ADAPTER not in layer.lora_magnitude_vector:
            continue
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight
        down, up = (side[ADAPTER].weight.float().flatten(1) for side in (layer.lora_A, layer.lora_B))
        weight = base_weight(layer.get_base_layer()).flatten(1)
        norms = torch.addmm(weight, up, down, alpha=layer.scaling[ADAPTER]).norm(dim=1)
        magnitude.copy_(norms.view_as(magnitude))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with gradients by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _add_adapter(model: Any, lora: LoraConfig, seed: int, path: str) -> None:
    with torch.random.fork_rng(devices=[]):  # PEFT draws its initialization from the CPU's global generator
        model.add_adapter(lora, ADAPTER)
    cast_training_params(model, torch.float32)
    for name, layer in lora_layers(model).items():
        if isinstance(lora, AdaLoraConfig):
            size = lora.init_r, layer.in_features + layer.out_features
            initialize(layer, torch.randn(size, generator=generator("cpu", seed, "lora_init", path + name)))
            continue
        down = layer.lora_A[ADAPTER].weight
        # Drawn on the CPU, so that a seed gives the same LoRA on every device.
        noise = torch.randn(down.shape, generator=generator("cpu", seed, "lora_init", path + name))
        down.data.copy_(noise / layer.r[ADAPTER])
        if ADAPTER in layer.lora_magnitude_vector:
            dora = layer.lora_magnitude_vector[ADAPTER]
            dora.get_weight_norm = partial(_norm_in_fp32, dora.get_weight_norm)
    start_magnitudes(model)


def _norm_in_fp32(norm: Callable[..., Tensor], weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's row norms of a DoRA layer in fp32; its convolutions pass W in half precision under autocast."""
    return norm(weight.float(), *args, **kwargs)


def _block_ranks(text: str | None, targets: list[str]) -> dict[str, int]:
    """Parse `mid_block=16,up_blocks.0=8` to a rank by target layer; a later block overrides an earlier."""
    ranks: dict[str, int] = {}
    for part in split(text or ""):
        block, _, rank = part.partition("=")
        if not rank.strip().isdigit() or int(rank) < 1:
            raise ConfigError(f"lora_block_ranks: {part!r} must be BLOCK=RANK, such as mid_block=16")
        in_block = [name for name in targets if _is_inside(name, block.strip())]
        if not in_block:
            raise ConfigError(f"lora_block_ranks: {block!r} has no layer to train; name a trained block")
        ranks |= dict.fromkeys(in_block, int(rank))
    return ranks


def _is_inside(name: str, block: str) -> bool:
    block = block.removeprefix("unet.").removeprefix("transformer.")
    return name == block or name.startswith(f"{block}.")
