"""A training run's state on disk: LoRA, optimizer, learning-rate schedule and step, as safetensors and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.tensor_file import load_optimizer, load_tensors, optimizer_tensors, save_tensors

STATE_FILE = "state.safetensors"


def save_state(
    folder: Path,
    step: int,
    trainable: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    lr_schedule: torch.optim.lr_scheduler.LRScheduler,
    extra: dict[str, Any],
) -> None:
    """Write the state after `step` optimizer steps. Draws are functions of the step, so no RNG state is needed."""
    tensors, header = optimizer_tensors(optimizer)
    tensors |= {f"lora.{name}": parameter for name, parameter in trainable.items()}
    header = {"step": step, "optimizer": header, "lr_schedule": lr_schedule.state_dict(), "extra": extra}
    save_tensors(folder / STATE_FILE, tensors, header)


def load_state(
    folder: Path,
    trainable: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    lr_schedule: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[int, dict[str, Any]]:
    """Restore what `save_state` wrote; returns the step and `extra`. Raises ConfigError when the LoRAs differ."""
    tensors, header = load_tensors(folder / STATE_FILE)
    saved = {name.removeprefix("lora."): value for name, value in tensors.items() if name.startswith("lora.")}
    shapes = {name: parameter.shape for name, parameter in trainable.items()}
    if shapes != {name: value.shape for name, value in saved.items()}:
        raise ConfigError(f"{folder.name} holds another LoRA (rank or layers differ); resume with the settings it had")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(saved[name])
    load_optimizer(optimizer, tensors, header["optimizer"])
    lr_schedule.load_state_dict(header["lr_schedule"])
    return int(header["step"]), header["extra"]
