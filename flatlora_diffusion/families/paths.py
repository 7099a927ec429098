"""Where the files of a base are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from flatlora_diffusion.config import INCLUDED_BASES, ConfigError, ModelConfig
from flatlora_diffusion.storage.formatting import first_line

SETTING = "pretrained_model_name_or_path"


def base_path(name_or_path: str) -> str:
    """Return the folder, file or hub id of a base, also of an included base."""
    return str(INCLUDED_BASES.get(name_or_path, name_or_path))


def config_file(config: ModelConfig, part: str) -> Path | None:
    """Return the part's config.json in the base's folder or in the hub's cache; None if it is in neither."""
    vae = config.pretrained_vae_model_name_or_path
    if part == "vae" and vae is not None:
        return _file(vae, "config.json", None)
    return base_file(config, f"{part}/config.json")


def base_file(config: ModelConfig, name: str) -> Path | None:
    """Return a file of the base's folder, or of the folder of a single file's configs; None if it is not on disk."""
    path = config.single_file_config or base_path(config.pretrained_model_name_or_path)
    return _file(path, name, config.revision)


def read_settings(file: Path) -> dict[str, Any]:
    """Return the contents of a config file of a base. Raises ConfigError if it is damaged."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({first_line(error)}); copy or download the base again") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} is damaged (it is not an object); copy or download the base again")
    return settings


@contextmanager
def base_given_as(setting: str) -> Iterator[None]:
    """Name `setting` instead of --pretrained_model_name_or_path in errors."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace(SETTING, setting)) from error


def _file(path: str, name: str, revision: str | None) -> Path | None:
    file = Path(path, name)
    if file.is_file():
        return file
    try:
        cached = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:  # a file path, not a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None
