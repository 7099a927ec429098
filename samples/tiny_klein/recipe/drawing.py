"""The saved base as the report on its quality draws with it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from samples.tiny_klein.recipe.training import TOKENS
from samples.tiny_sdxl.recipe.drawing import STEPS, Draw
from samples.tiny_sdxl.recipe.icons import SIZE


def load_tiny_klein(base: Path) -> Draw:
    """The saved tiny klein base."""
    pipeline = Flux2KleinPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: list[str], generators: list[torch.Generator], guidance: float) -> list[Image.Image]:
        with torch.autocast("cpu", torch.bfloat16):  # matrices only: half the time
            images: list[Image.Image] = pipeline(
                prompt=prompts,
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                height=SIZE,
                width=SIZE,
                generator=generators,
                max_sequence_length=TOKENS,
            ).images
        return images

    return draw
