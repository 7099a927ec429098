"""Parses arguments that name LoRA files: a file, a run folder, or several with weights; opens nothing.

Needs no torch, so that a wrong path is reported before torch is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.storage.model_paths import SAFETENSORS
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and its weight in a combination of LoRAs."""

    path: Path
    weight: float = 1.0


def lora_file(text: str) -> Path:
    """Resolve a path to a LoRA file or to a run folder. Raises ConfigError if there is no LoRA file."""
    if not text:
        raise ConfigError("file is missing: give the path of a LoRA file")
    path = Path(text)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a .safetensors file or a folder with {LORA_FILE}")
    if path.is_dir() and not (path / LORA_FILE).is_file():
        raise ConfigError(f"{path} is a folder without {LORA_FILE}; give a .safetensors file")
    file = lora_path(path)
    if file.suffix.lower() != SAFETENSORS:
        raise ConfigError(f"{path} is not a .safetensors file; other formats may contain code and are not read")
    return file


def lora_path(path: Path) -> Path:
    """The LoRA file in a folder; any other path unchanged."""
    return path / LORA_FILE if path.is_dir() else path


def run_of(file: Path) -> RunDir | None:
    """The run whose folder, or checkpoint, a LoRA file is in; None for any other file."""
    run = RunDir(file.parent.parent if file.parent.name.startswith("checkpoint-") else file.parent)
    return run if run.config_file.is_file() and run.events_file.is_file() else None


def unique_path_ends(paths: Sequence[Path]) -> list[str]:
    """The shortest ends, of equally many parts, that distinguish all `paths`; empty if two paths are equal."""
    for count in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        ends = [Path(*path.parts[-count:]).as_posix() for path in paths]
        if len(set(ends)) == len(ends):
            return ends
    return []


def parse_lora(text: str) -> tuple[LoraFile, ...]:
    """Parse `PATH`, `PATH@WEIGHT` or several of these joined by `+`; a folder stands for the LoRA in it.

    Raises:
        ConfigError: A path is neither a LoRA file nor a folder with a LoRA file.
    """
    parts = [text] if Path(text).exists() else text.split("+")
    files = tuple(_parse_part(part) for part in parts)
    if len({file.path for file in files}) < len(files):
        raise ConfigError(f"lora={text!r} contains a file twice; give it once, with a weight: PATH@1.5")
    return files


def _parse_part(part: str) -> LoraFile:
    path, weight = Path(part), 1.0
    weighted = re.fullmatch(r"(.+)@(-?[0-9]*\.?[0-9]+)", part)
    if weighted and not path.exists():
        path, weight = Path(weighted[1]), float(weighted[2])
    file = lora_path(path)
    if not file.is_file():
        raise ConfigError(f"lora={part!r} is neither a LoRA file nor a folder with {LORA_FILE}; give one of these")
    if file.suffix.lower() != SAFETENSORS:
        raise ConfigError(f"lora={part!r} is not a .safetensors file; other formats may contain code and are not read")
    return LoraFile(Path(os.path.abspath(file)), weight)
