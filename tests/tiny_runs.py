"""Short trainings on the tiny random pipeline, and what they compute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.adapter.delta import lora_updates, magnitudes
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.lora_files.diffusers_file import save_diffusers_file
from flatlora_diffusion.storage.run_dir import LORA_FILE
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step


def samples_of(config: TrainConfig) -> list[Any]:
    return load_samples(Path(str(config.data.instance_data_dir))).samples


def trained(config: TrainConfig, steps: int = 3) -> TrainState:
    state = prepare(config, samples_of(config))
    for step in range(steps):
        train_step(state, step)
    return state


def save_lora(pipeline: Any, folder: Path) -> Path:
    """The pipeline's LoRA as diffusers' file in the folder."""
    file = folder / LORA_FILE
    save_diffusers_file(pipeline, lora_updates(pipeline), magnitudes(pipeline), file, torch.float32)
    return file


def output_with(pipeline: Any, state: TrainState, prompt: str = "an icon of thing 0") -> Tensor:
    """The UNet's answer for a prompt, on fixed noise: what a LoRA file must reproduce."""
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    added = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.no_grad():
        return pipeline.unet(latents, torch.tensor([500]), prompt_embeds, added_cond_kwargs=added).sample


def age(folder: Path, hours: float = 2) -> None:
    """Let all in the folder have happened hours ago, in the order in which it has."""
    for path in [folder, *folder.rglob("*")]:
        then = path.stat().st_mtime - hours * 3600
        os.utime(path, (then, then))
