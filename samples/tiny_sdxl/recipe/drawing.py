"""The icons that the base is judged by: one per concept and prompt, drawn once and kept as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
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

Draw = Callable[[list[str], list[torch.Generator], float], list[Image.Image]]
"""A loaded base: draws an icon of each prompt, in STEPS steps, from the noise of its generator and with a guidance."""


def load_tiny_sdxl(base: Path) -> Draw:
    """The saved tiny SDXL base."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: list[str], generators: list[torch.Generator], guidance: float) -> list[Image.Image]:
        images: list[Image.Image] = pipeline(
            prompt=prompts,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            height=SIZE,
            width=SIZE,
            original_size=(SIZE, SIZE),
            target_size=(SIZE, SIZE),
            generator=generators,
        ).images
        return images

    return draw


def draw_icons(
    base: Path,
    concepts: Sequence[Concept],
    prompt: str,
    guidance: float,
    kept: Path,
    load: Callable[[Path], Draw] = load_tiny_sdxl,
) -> list[Image.Image]:
    """One 64-pixel image per concept; `prompt` has the place of its name. Those that `kept` has are not drawn again.

    An image's noise depends on its concept alone, not on its neighbours in the batch.
    """
    folder = kept / _key(base, prompt, guidance)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{concept.hexcode}.png" for concept in concepts]
    missing = [place for place, file in enumerate(files) if not file.is_file()]
    if missing:
        draw = load(base)
        for start in tqdm(range(0, len(missing), BATCH), desc=prompt.format("NAME"), unit="batch"):
            batch = missing[start : start + BATCH]
            prompts = [prompt.format(concepts[place].name) for place in batch]
            generators = [generator("cpu", 0, "quality", concepts[place].hexcode) for place in batch]
            for place, image in zip(batch, draw(prompts, generators, guidance), strict=True):
                with atomic_write(files[place]) as aside:
                    image.save(aside, format="PNG")
    return [_read(file) for file in files]


def size_of(base: Path) -> float:
    """The megabytes of all files of the pipeline itself."""
    return sum(file.stat().st_size for part in _parts(base) for file in part.iterdir()) / 1e6


def _parts(base: Path) -> list[Path]:
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    return [base / name for name, value in index.items() if isinstance(value, list) and (base / name).is_dir()]


def _key(base: Path, prompt: str, guidance: float) -> str:
    """The hash of all that an image depends on, beside its concept."""
    weights = [file_sha256(file) for part in _parts(base) for file in part.glob("*.safetensors")]
    return hashlib.sha256(json.dumps([weights, prompt, guidance, STEPS, SIZE]).encode()).hexdigest()[:16]


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
