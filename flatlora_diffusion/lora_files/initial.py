"""The LoRA that a run starts from: read from a file in any layout, and set in the run's new LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flatlora_diffusion.adapter.lora import ADAPTER, lora_layers, start_magnitudes
from flatlora_diffusion.adapter.update import shared_path
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.ground.run_dir import LORA_FILE
from flatlora_diffusion.lora_files.names import loaded_names
from flatlora_diffusion.lora_files.place import in_folder
from flatlora_diffusion.lora_files.reading import ImportedLora, lora_of_base
from flatlora_diffusion.lora_files.safe_reading import checked_file


def read_lora(pipeline: Any, path: Path) -> ImportedLora:
    """The LoRA of a file, or of the run folder that holds it, for a pipeline without one.

    Raises ConfigError for a file that cannot be read or that adapts nothing of this base.
    """
    file = in_folder(path)
    if not file.is_file():
        raise ConfigError(f"init_lora={str(path)!r} is no LoRA file and no folder that holds {LORA_FILE}")
    return lora_of_base(checked_file(file), loaded_names(pipeline))


@torch.no_grad()
def set_lora(pipeline: Any, lora: ImportedLora) -> None:
    """Let the pipeline's new LoRA start from `lora`. Raises ConfigError when ranks, layers or DoRA do not fit."""
    for part, layers in lora.updates.items():
        mine = {shared_path(part, name): layer for name, layer in lora_layers(getattr(pipeline, part)).items()}
        strange = sorted(set(layers) - set(mine))
        if strange:
            raise ConfigError(
                f"init_lora adapts {len(strange)} layer(s) of the {part} that this run does not train, such as "
                f"{strange[0]}; set --lora_target_modules, --lora_unet_blocks or --train_text_encoder as it was made"
            )
        for name, (down, up, scale) in layers.items():
            layer = mine[name]
            kept = layer.r[ADAPTER]
            if len(down) < kept or bool(down[kept:].any()):
                raise ConfigError(f"rank={kept}, but init_lora has rank {len(down)} at {name}; use --rank {len(down)}")
            layer.lora_A[ADAPTER].weight.copy_(down[:kept])
            layer.lora_B[ADAPTER].weight.copy_(up[:, :kept] * (scale / layer.scaling[ADAPTER]))
        start_magnitudes(getattr(pipeline, part))  # a plain LoRA has none of its own
        for name, magnitude in lora.magnitudes.get(part, {}).items():
            if ADAPTER not in mine[name].lora_magnitude_vector:
                raise ConfigError("init_lora is a DoRA, whose magnitudes this run would lose; set --use_dora")
            mine[name].lora_magnitude_vector[ADAPTER].weight.copy_(magnitude)
