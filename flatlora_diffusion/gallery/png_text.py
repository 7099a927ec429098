"""Text chunks of a PNG: A1111's `parameters` line, ComfyUI's workflow, and all settings as JSON.

They have names of the base and the LoRAs and hashes of LoRA files, but no paths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from flatlora_diffusion.config import GenerateConfig
from flatlora_diffusion.families.drawing import (
    NOISE_FROM,
    PARAMETERS,
    Drawing,
    a1111_sampler,
    a1111_text,
    add_drawing,
)
from flatlora_diffusion.storage.versions import PROGRAM, __version__

SETTINGS = "flatlora_diffusion"


@dataclass(frozen=True)
class UsedLora:
    """A LoRA of an image, with its strength and hash."""

    name: str
    strength: float
    sha256: str


def image_text(
    config: GenerateConfig,
    sampler: str,
    prompt: str,
    seed: int,
    loras: Sequence[UsedLora],
    drawing: Drawing | None = None,
) -> PngInfo:
    """Return the text chunks of an image.

    Args:
        config: settings with resolution and precision.
        sampler: class name of the scheduler.
        drawing: the generation parameters for ComfyUI and A1111; None if they cannot reproduce the image.
    """
    settings = {"prompt": prompt, "seed": seed, "lora": [asdict(lora) for lora in loras]}
    text = grid_text(config, sampler, settings)
    if drawing is None:
        text.add_text(PARAMETERS, _parameters(config, sampler, prompt, seed, loras))
    else:
        add_drawing(text, drawing)
    return text


def grid_text(config: GenerateConfig, sampler: str, settings: dict[str, Any]) -> PngInfo:
    """Return the JSON chunk: `settings` of these images and all common settings."""
    model = {name: bare_name(value) if isinstance(value, str) else value for name, value in vars(config.model).items()}
    specific = {"model", "prompts", "prompts_file", "seeds", "lora", "strengths", "output_dir"}
    shared = {item.name: getattr(config, item.name) for item in fields(config) if item.name not in specific}
    program = {"program": PROGRAM, "version": __version__}
    text = PngInfo()
    text.add_text(SETTINGS, json.dumps({**program, **settings, **shared, **model, "sampler": sampler}))
    return text


def bare_name(name_or_path: str) -> str:
    """Return a hub id unchanged, or the last part of a path."""
    path = Path(name_or_path)
    return path.resolve().name if path.is_absolute() or path.exists() else name_or_path


def _parameters(config: GenerateConfig, sampler: str, prompt: str, seed: int, loras: Sequence[UsedLora]) -> str:
    base = Path(bare_name(config.model.pretrained_model_name_or_path)).name.removesuffix(".safetensors")
    values: dict[str, Any] = {
        "Steps": config.num_inference_steps,
        "Sampler": a1111_sampler(sampler),
        "CFG scale": config.guidance_scale,
        "Seed": seed,
        "Size": f"{config.resolution}x{config.resolution}",
        "Model": base,
        "RNG": NOISE_FROM,
    }
    if loras:
        values["Lora"] = ", ".join(f"{lora.name}: {lora.strength:g}" for lora in loras)
    return a1111_text(prompt, config.negative_prompt, [(lora.name, lora.strength) for lora in loras], values)
