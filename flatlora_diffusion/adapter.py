"""The LoRA on the UNet's attention layers: made from a seed, kept in fp32, saved as plain LoRA."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.config import AdapterConfig
from flatlora_diffusion.seeds import generator
from flatlora_diffusion.tensor_file import write_atomically

ADAPTER = "default"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(unet: UNet2DConditionModel, config: AdapterConfig, seed: int) -> None:
    """Put a LoRA on the attention layers: A ~ N(0, 1/rank^2) as a function of (seed, layer), B = 0, both fp32."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=list(ATTENTION),
    )
    with torch.random.fork_rng():  # PEFT draws its initialization from the global generator
        unet.add_adapter(lora, ADAPTER)
    cast_training_params(unet, torch.float32)
    for name, layer in lora_layers(unet).items():
        down = layer.lora_A[ADAPTER].weight
        # Drawn on the CPU, so that one seed gives one LoRA on every device.
        value = torch.randn(down.shape, generator=generator("cpu", seed, "lora_init", name)) / config.rank
        down.data.copy_(value)


def lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by module path."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def trainable_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the model's order."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def lora_state_dict(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A and B of every layer in diffusers' names; alpha/rank is folded into B, so that no reader needs it."""
    state = {}
    for name, layer in lora_layers(unet).items():
        state[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach().cpu().contiguous()
        up = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
        state[f"{name}.lora_B.weight"] = up.cpu().contiguous()
    return state


def save_lora(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Write `pytorch_lora_weights.safetensors` for `load_lora_weights` of a stock pipeline; returns its path."""
    path = folder / LORA_FILE

    def write(aside: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            StableDiffusionXLPipeline.save_lora_weights(scratch, unet_lora_layers=lora_state_dict(unet))
            (Path(scratch) / LORA_FILE).replace(aside)

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    return path
