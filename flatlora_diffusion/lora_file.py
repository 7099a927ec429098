"""The LoRA as a file for diffusers, and back: scale folded into B, so that no reader needs it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from flatlora_diffusion.adapter import ADAPTER, lora_layers
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.tensor_file import write_atomically

LORA_FILE = "pytorch_lora_weights.safetensors"
PARTS = ("unet", "text_encoder", "text_encoder_2")

Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""A and sB by module path, by part of the pipeline."""


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A, sB and DoRA's magnitudes of every layer in PEFT's names, fp32 on the CPU.

    Layers of a lower rank are padded with zeros to the highest: diffusers takes one alpha for all.
    """
    state = {}
    layers = lora_layers(model)
    rank = max((layer.r[ADAPTER] for layer in layers.values()), default=0)
    for name, layer in layers.items():
        down = layer.lora_A[ADAPTER].weight.detach()
        up = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
        missing = rank - len(down)
        state[f"{name}.lora_A.weight"] = F.pad(down.transpose(0, -1), (0, missing)).transpose(0, -1)
        state[f"{name}.lora_B.weight"] = F.pad(up.transpose(1, -1), (0, missing)).transpose(1, -1)
        if ADAPTER in layer.lora_magnitude_vector:
            state[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector[ADAPTER].weight.detach()
    return {key: value.float().cpu().contiguous() for key, value in state.items()}


def expected_tensors(pipeline: Any) -> dict[str, Tensor]:
    """What the LoRA file of the pipeline holds, by key."""
    return {
        f"{part}.{key}": value for part, state in _states(pipeline).items() for key, value in (state or {}).items()
    }


def save_lora(pipeline: Any, folder: Path) -> Path:
    """Write `pytorch_lora_weights.safetensors` for `load_lora_weights` of a stock pipeline; returns its path."""
    path = folder / LORA_FILE
    states = _states(pipeline)

    def write(aside: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            StableDiffusionXLPipeline.save_lora_weights(
                scratch, **{f"{part}_lora_layers": state for part, state in states.items()}
            )
            (Path(scratch) / LORA_FILE).replace(aside)

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    return path


def read_lora(pipeline: Any, path: Path) -> Factors:
    """The LoRA of a file (or of the run folder that holds it) in any layout that diffusers reads.

    Raises ConfigError for a file that cannot be read or that adapts nothing of this base; the pipeline stays as is.
    """
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"init_lora={str(path)!r} is no LoRA file and no folder that holds {LORA_FILE}")
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
    except Exception as error:  # diffusers and peft raise whatever their parsing runs into
        pipeline.unload_lora_weights()
        raise ConfigError(f"init_lora: {file.name} cannot be read as a LoRA of this base: {_line(error)}") from error
    found: Factors = {}
    for part in PARTS:
        for name, layer in lora_layers(getattr(pipeline, part)).items():
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            factors = (down.detach().float().clone(), up.detach().float() * layer.scaling[ADAPTER])
            found.setdefault(part, {})[name] = factors
    pipeline.unload_lora_weights()
    if not found:
        raise ConfigError(f"init_lora: {file.name} holds no layer of this base")
    return found


@torch.no_grad()
def set_lora(pipeline: Any, factors: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> None:
    """Let the pipeline's new LoRA start from `factors`. Raises ConfigError when ranks or layers do not fit."""
    for part, layers in factors.items():
        mine = lora_layers(getattr(pipeline, part))
        strange = sorted(set(layers) - set(mine))
        if strange:
            raise ConfigError(
                f"init_lora adapts {len(strange)} layer(s) of the {part} that this run does not train, such as "
                f"{strange[0]}; set --lora_target_modules, --lora_unet_blocks or --train_text_encoder as it was made"
            )
        for name, (down, up) in layers.items():
            layer = mine[name]
            kept = layer.r[ADAPTER]
            if len(down) < kept or bool(down[kept:].any()):
                raise ConfigError(f"rank={kept}, but init_lora has rank {len(down)} at {name}; use --rank {len(down)}")
            layer.lora_A[ADAPTER].weight.copy_(down[:kept])
            layer.lora_B[ADAPTER].weight.copy_(up[:, :kept] / layer.scaling[ADAPTER])


def _states(pipeline: Any) -> dict[str, dict[str, Tensor] | None]:
    """The state of each part, None for a part without a LoRA.

    CLIP's layers are named as all tools know them; transformers has dropped `text_model.` from the first encoder's.
    """
    states: dict[str, dict[str, Tensor] | None] = {}
    for part in PARTS:
        state = lora_state_dict(getattr(pipeline, part))
        if part != "unet":
            state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
        states[part] = state or None
    return states


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
