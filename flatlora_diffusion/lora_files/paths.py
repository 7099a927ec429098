"""Reads arguments that name LoRA files: a file, a folder that holds one, or several with weights; opens nothing.

Needs no torch, so that a wrong path is told before it is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.storage.model_paths import SAFETENSORS
from flatlora_diffusion.storage.run_dir import LORA_FILE


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and its weight among those that are used together."""

    path: Path
    weight: float = 1.0


def lora_file(text: str) -> Path:
    """The file of a path to it or to the folder of a run. Raises ConfigError when there is none."""
    if not text:
        raise ConfigError("file is missing: give a LoRA file")
    path = Path(text)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a .safetensors file, or a folder that holds {LORA_FILE}")
    if path.is_dir() and not (path / LORA_FILE).is_file():
        raise ConfigError(f"{path} is a folder without {LORA_FILE}; give a .safetensors file")
    file = in_folder(path)
    if file.suffix.lower() != SAFETENSORS:
        raise ConfigError(f"{path} is no .safetensors file; other formats can hold code and are not read")
    return file


def in_folder(path: Path) -> Path:
    """The LoRA in a folder; any other path as it is."""
    return path / LORA_FILE if path.is_dir() else path


def distinct_ends(paths: Sequence[Path]) -> list[str]:
    """The ends of equally many parts, as few as tell all `paths` apart; none where two paths are the same."""
    for count in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        ends = [Path(*path.parts[-count:]).as_posix() for path in paths]
        if len(set(ends)) == len(ends):
            return ends
    return []


def parse_lora(text: str) -> tuple[LoraFile, ...]:
    """The files of `PATH`, `PATH@WEIGHT` or several of these joined by `+`; a folder stands for the LoRA in it.

    Raises ConfigError for a path that is no LoRA file and no folder with one.
    """
    parts = [text] if Path(text).exists() else text.split("+")
    files = tuple(_parse_part(part) for part in parts)
    if len({file.path for file in files}) < len(files):
        raise ConfigError(f"lora={text!r} has one file twice; give it once, with a weight: PATH@1.5")
    return files


def _parse_part(part: str) -> LoraFile:
    path, weight = Path(part), 1.0
    weighted = re.fullmatch(r"(.+)@(-?[0-9]*\.?[0-9]+)", part)
    if weighted and not path.exists():
        path, weight = Path(weighted[1]), float(weighted[2])
    file = in_folder(path)
    if not file.is_file():
        raise ConfigError(f"lora={part!r} is no LoRA file and no folder that holds {LORA_FILE}")
    if file.suffix.lower() != SAFETENSORS:
        raise ConfigError(f"lora={part!r} is no .safetensors file; other formats can hold code and are not read")
    return LoraFile(Path(os.path.abspath(file)), weight)
