"""Draws and caches pictures of the base and of LoRA files for given prompts and seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.sampling import generate_images
from flatlora_diffusion.lora_files.loading import lora_scale, loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.storage.atomic_io import atomic_write, file_sha256
from flatlora_diffusion.storage.hashing import base_fingerprint

Key = tuple[str, int]  # prompt, seed
_BATCH, _PIXELS = 8, 1024**2  # limits of a batch: a stop loses one, and it takes no more memory than one SDXL image


class PictureGenerator:
    """Draws pictures into the folder `cache`; a file's name is the hash of everything its picture depends on."""

    def __init__(
        self, base: Base, resolution: int, cache: Path, steps: int | None = None, guidance: float | None = None
    ) -> None:
        asked = ImageSettings(resolution, steps, guidance)
        self._base, self._cache = base, cache
        self._settings = resolution, base.steps_of(asked), base.guidance_of(asked)
        self._identity = [base_fingerprint(base.denoiser), base.clip_skip]

    def generate(self, lora: Path | None, keys: Sequence[Key], strength: float = 1.0) -> dict[Key, Image.Image]:
        """Draw the pictures of `keys`, RGB, with `lora` or with the base alone."""
        files = dict(zip(keys, self.files(lora, keys, strength), strict=True))
        missing = {key: file for key, file in files.items() if not file.is_file()}
        if missing and lora is None:
            self._draw(missing)
        elif missing and lora is not None:
            pipeline, loras = self._base.pipeline, [LoraFile(lora)]
            with loras_loaded(pipeline, loras), lora_scale(pipeline, loras, strength, merge=False):
                self._draw(missing)
        return {key: read_picture(file) for key, file in files.items()}

    def passes(self, lora: Path | None, keys: Sequence[Key], strength: float = 1.0) -> int:
        """The samples that `generate` passes through the denoiser, 0 if all pictures are cached."""
        exists = lora is None or lora.is_file()
        missing = sum(not file.is_file() for file in self.files(lora, keys, strength)) if exists else len(keys)
        return missing * self.passes_per_picture

    @property
    def guidance(self) -> float:
        """The guidance of the pictures: what was asked for, if the base has any."""
        return self._settings[2]

    @property
    def passes_per_picture(self) -> int:
        """The samples that a picture passes through the denoiser."""
        _, steps, guidance = self._settings
        return steps * (2 if guidance > 1 else 1)

    def files(self, lora: Path | None, keys: Sequence[Key], strength: float = 1.0) -> list[Path]:
        """The cache files of `keys`, drawn or not."""
        content = "base" if lora is None else f"{file_sha256(lora)} at {strength:g}"
        identities = [json.dumps([*self._identity, content, *key, *self._settings]) for key in keys]
        return [self._cache / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.png" for text in identities]

    def _draw(self, files: Mapping[Key, Path]) -> None:
        """Draw in batches and save each. Chunks of what is missing are the same again after a stop between batches."""
        settings = ImageSettings(*self._settings)
        self._cache.mkdir(parents=True, exist_ok=True)
        items = list(files.items())
        batch_size = max(1, min(_BATCH, _PIXELS // settings.resolution**2))
        for start in range(0, len(items), batch_size):
            keys, paths = zip(*items[start : start + batch_size], strict=True)
            prompts, seeds = zip(*keys, strict=True)
            images = generate_images(self._base, prompts, seeds, settings, batch_size)
            for path, image in zip(paths, images, strict=True):
                with atomic_write(path) as temporary:
                    image.save(temporary, format="PNG")


def read_picture(file: Path) -> Image.Image:
    """Read a picture as RGB."""
    with Image.open(file) as image:
        return image.convert("RGB")
