"""What `evidence` does by default: a training with the paper's settings on the sample icons, in parts."""

from __future__ import annotations

from typing import NamedTuple

from flatlora_diffusion.config import SDXL

BASE, ENCODERS = SDXL, ("openai/clip-vit-large-patch14", "facebook/dinov2-base")
DOWNLOADS = {BASE: int(6.9e9), ENCODERS[0]: int(1.7e9), ENCODERS[1]: int(0.35e9)}
"""Bytes by model; the base in half precision."""
DEFAULTS = (
    *("--preset", "paper", "--instance_data_dir", "samples/icons_3d", "--resolution", "1024", "--cache_latents"),
    *("--gradient_checkpointing", "--num_checkpoints", "2", "--pictures_per_prompt", "1"),
    *("--encoders", *ENCODERS, "--output_dir", "evidence"),
)
BASE_FLAGS = ("--pretrained_model_name_or_path", BASE, "--variant", "fp16")
"""Flags for use if no base is given."""


class Part(NamedTuple):
    """A comparison that repeats and extends the one before; it trains and measures only what is new."""

    name: str
    arms: tuple[str, ...]
    num_seeds: int = 1
    controls: bool = False


_TWO = ("lora", "flat-lora")
_THREE = (*_TWO, "lora:members=3")
PARTS = (
    Part("LoRA and Flat-LoRA", _TWO),
    Part("the average of three LoRAs", _THREE),
    Part("three seeds", _THREE, num_seeds=3),
    Part("SAM", (*_THREE, "sam"), num_seeds=3),
    Part("the controls", (*_THREE, "sam"), num_seeds=3, controls=True),
)
"""In the order of their value: each writes its report and figures before the next one starts."""
PART_FLAGS = ("arms", "num_seeds", "controls", "no_controls")
"""Flags that replace `PARTS` with one comparison of these settings."""
