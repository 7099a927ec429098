"""Which preview pictures the settings ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flatlora_diffusion.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Picture:
    """One preview image to make."""

    prompt: str
    seed: int
    negative_prompt: str | None = None


def read_pictures(run: RunConfig) -> list[Picture]:
    """The pictures that the settings ask for. Raises ConfigError for a prompts file that cannot be used."""
    pictures = []
    if run.validation_prompt is not None:
        pictures = [Picture(run.validation_prompt, seed) for seed in range(run.num_validation_images)]
    if run.validation_prompts_file is None:
        return pictures
    path = Path(run.validation_prompts_file)
    if not path.is_file():
        raise ConfigError(f"validation_prompts_file={run.validation_prompts_file!r} is no file")
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            pictures.append(Picture(**{"seed": 0, **json.loads(line)}))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f'{path.name} line {number} must be like {{"prompt": "...", "negative_prompt": "...", "seed": 0}}'
            ) from error
    return pictures
