"""Pictures of the base and of LoRA files for given prompts and seeds, each drawn once and kept as a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from flatlora_diffusion.lora_files.loading import lora_scale, loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.sdxl.sampling import GUIDANCE, STEPS, generate_images
from flatlora_diffusion.storage.atomic_io import file_sha256, writing_whole
from flatlora_diffusion.storage.hashing import base_fingerprint

Key = tuple[str, int]  # prompt, seed


class PictureGenerator:
    """Draws with `steps` and `guidance`; a file's name is the hash of all that its picture depends on."""

    def __init__(
        self, sdxl: Sdxl, resolution: int, kept: Path, steps: int = STEPS, guidance: float = GUIDANCE
    ) -> None:
        self._sdxl, self._kept, self._settings = sdxl, kept, (resolution, steps, guidance)
        self._base = [base_fingerprint(sdxl.unet), sdxl.clip_skip]

    def generate(self, lora: Path | None, keys: Sequence[Key], strength: float = 1.0) -> dict[Key, Image.Image]:
        """The pictures of `keys`, RGB, by the base with `lora` or by the base alone."""
        files = dict(zip(keys, self.files(lora, keys, strength), strict=True))
        missing = {key: file for key, file in files.items() if not file.is_file()}
        if missing and lora is None:
            self._draw(missing)
        elif missing and lora is not None:
            pipeline, used = self._sdxl.pipeline, [LoraFile(lora)]
            with loras_loaded(pipeline, used), lora_scale(pipeline, used, strength, merge=False):
                self._draw(missing)
        return {key: _read(file) for key, file in files.items()}

    def left(self, lora: Path | None, keys: Sequence[Key], strength: float = 1.0) -> int:
        """How many samples the UNet has to see for the pictures of `keys` that are not kept."""
        _, steps, guidance = self._settings
        is_there = lora is None or lora.is_file()
        missing = sum(not file.is_file() for file in self.files(lora, keys, strength)) if is_there else len(keys)
        return missing * steps * (2 if guidance > 1 else 1)

    def files(self, lora: Path | None, keys: Sequence[Key], strength: float = 1.0) -> list[Path]:
        """The files in which the pictures of `keys` are kept, drawn or not."""
        content = "base" if lora is None else f"{file_sha256(lora)} at {strength:g}"
        depends = [json.dumps([*self._base, content, *key, *self._settings]) for key in keys]
        return [self._kept / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.png" for text in depends]

    def _draw(self, files: Mapping[Key, Path]) -> None:
        resolution, steps, guidance = self._settings
        self._kept.mkdir(parents=True, exist_ok=True)
        # One at a time: which pictures are missing must not change any of them, and a stop loses none that is drawn.
        for (prompt, seed), file in files.items():
            (image,) = generate_images(self._sdxl, [prompt], [seed], resolution, steps, guidance, batch_size=1)
            with writing_whole(file) as aside:
                image.save(aside, format="PNG")


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
