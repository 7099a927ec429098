"""The preview images that the settings ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flatlora_diffusion.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Picture:
    """Prompt and seed of a preview image."""

    prompt: str
    seed: int
    negative_prompt: str | None = None


def read_pictures(run: RunConfig) -> list[Picture]:
    """The pictures of --validation_prompt and --validation_prompts_file. Raises ConfigError for an unusable file."""
    pictures = [Picture(prompt, seed) for prompt in run.preview_prompts for seed in range(run.num_validation_images)]
    if run.validation_prompts_file is None:
        return pictures
    path = Path(run.validation_prompts_file)
    if not path.is_file():
        raise ConfigError(
            f"validation_prompts_file={run.validation_prompts_file!r} is not a file; give a JSON lines file"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"validation_prompts_file={run.validation_prompts_file!r} cannot be read; give a UTF-8 text file"
        ) from error
    return pictures + [
        _picture(line, f"{path.name} line {n}") for n, line in enumerate(lines, start=1) if line.strip()
    ]


def _picture(line: str, where: str) -> Picture:
    try:
        picture = Picture(**{"seed": 0, **json.loads(line)})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f'{where} must look like {{"prompt": "...", "negative_prompt": "...", "seed": 0}}'
        ) from error
    for name, kind, is_right in (
        ("prompt", "a text", isinstance(picture.prompt, str)),
        ("negative_prompt", "a text", isinstance(picture.negative_prompt, str | None)),
        ("seed", "a whole number from 0 to 2^63 - 1", type(picture.seed) is int and 0 <= picture.seed < 2**63),
    ):
        if not is_right:
            raise ConfigError(f'{where}: "{name}" is {getattr(picture, name)!r}, but must be {kind}')
    return picture
