"""The icons that the base is judged by: one per concept and prompt, drawn once and kept as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tqdm import tqdm

from flatlora_diffusion.storage.atomic_io import atomic_write, file_sha256
from flatlora_diffusion.storage.rng import generator
from samples.tiny_sdxl.recipe.icons import SIZE, Concept

STEPS = 25
BATCH = 48
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def draw_icons(base: Path, concepts: Sequence[Concept], prompt: str, guidance: float, kept: Path) -> list[Image.Image]:
    """One 64-pixel image per concept; `prompt` has the place of its name. Those that `kept` has are not drawn again.

    An image's noise depends on its concept alone, not on its neighbours in the batch.
    """
    folder = kept / _key(base, prompt, guidance)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{concept.hexcode}.png" for concept in concepts]
    missing = [place for place, file in enumerate(files) if not file.is_file()]
    if missing:
        pipeline = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        for start in tqdm(range(0, len(missing), BATCH), desc=prompt.format("NAME"), unit="batch"):
            batch = missing[start : start + BATCH]
            for place, image in zip(
                batch, _draw(pipeline, [concepts[i] for i in batch], prompt, guidance), strict=True
            ):
                with atomic_write(files[place]) as aside:
                    image.save(aside, format="PNG")
    return [_read(file) for file in files]


def size_of(base: Path) -> float:
    """The megabytes of all files of the pipeline itself."""
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    parts = [base / name for name in index if not name.startswith("_")]
    return sum(file.stat().st_size for part in parts if part.is_dir() for file in part.iterdir()) / 1e6


def _draw(
    pipeline: StableDiffusionXLPipeline, concepts: Sequence[Concept], prompt: str, guidance: float
) -> list[Image.Image]:
    images: list[Image.Image] = pipeline(
        prompt=[prompt.format(concept.name) for concept in concepts],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=SIZE,
        width=SIZE,
        original_size=(SIZE, SIZE),
        target_size=(SIZE, SIZE),
        generator=[generator("cpu", 0, "quality", concept.hexcode) for concept in concepts],
    ).images
    return images


def _key(base: Path, prompt: str, guidance: float) -> str:
    """The hash of all that an image depends on, beside its concept."""
    weights = [file_sha256(file) for part in PARTS for file in (base / part).glob("*.safetensors")]
    return hashlib.sha256(json.dumps([weights, prompt, guidance, STEPS, SIZE]).encode()).hexdigest()[:16]


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
