"""The settings of a training as the app takes and keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatlora_diffusion.config import ConfigError, TrainConfig, settings_with


def checked_config(settings: Mapping[str, Any]) -> TrainConfig:
    """The config of `settings`. Raises ConfigError for wrong values, a token, or missing images."""
    config = TrainConfig.from_dict(settings)
    if config.run.hub_token is not None:
        raise ConfigError("hub_token would be saved with the settings; log in with `hf auth login` instead")
    if not config.data.is_given:
        raise ConfigError("there are no images to train on; upload some or give instance_data_dir")
    return config


def with_relative_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Make paths below the working folder relative. Other paths stay absolute, as a resumed run needs them."""
    here = Path.cwd()
    paths = {name: Path(settings[name]) for name in settings_with("is_path") if settings[name]}
    return settings | {
        name: path.relative_to(here).as_posix() for name, path in paths.items() if path.is_relative_to(here)
    }
