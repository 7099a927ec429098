"""`TrainConfig`, all settings of a training run: reading, changing and saving them, and their traits.

Each setting is defined in its section: `model.py`, `data.py`, `adapter.py`, `perturb.py`, `optim.py` or `run.py`.

Names and defaults are those of diffusers' `train_dreambooth_lora_sdxl.py` for settings of that script.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flatlora_diffusion.config.combinations import check_combinations
from flatlora_diffusion.config.methods import for_method
from flatlora_diffusion.config.removed import why_removed, without_removed
from flatlora_diffusion.config.sections import Sections
from flatlora_diffusion.config.setting import SAMPLES, ConfigError, Traits, read_value

_PRESETS = SAMPLES / "presets"


@dataclass(frozen=True)
class TrainConfig(Sections):
    """All settings of a training run, frozen.

    Raises:
        ConfigError: two settings exclude each other (both are named).
    """

    def __post_init__(self) -> None:
        check_combinations(self)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting by name, JSON-serializable."""
        return {name: value for section in fields(self) for name, value in vars(getattr(self, section.name)).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the defaults with the settings `values` by name, which may be those of an earlier version.

        Raises:
            ConfigError: an unknown name or an invalid value.
        """
        return cls().replace(**with_legacy_defaults(values))

    def replace(self, **values: Any) -> TrainConfig:
        """Return a copy with the settings `values` by name.

        Raises:
            ConfigError: an unknown name or an invalid value.
        """
        sections = {}
        unknown = dict(values)
        for section in fields(self):
            names = {item.name for item in fields(getattr(self, section.name))}
            changes = {name: unknown.pop(name) for name in list(unknown) if name in names}
            sections[section.name] = dataclasses.replace(getattr(self, section.name), **changes)
        if unknown:
            raise ConfigError(f"unknown setting(s): {', '.join(sorted(unknown))}; `train --help-all` lists all names")
        return TrainConfig(**sections)

    def of_method(self, method: str) -> TrainConfig:
        """Return this config for a method, without the settings of other methods."""
        return self.replace(**for_method(method))

    def updated_from(self, path: Path, method: str | None = None) -> TrainConfig:
        """Return this config with the settings of a JSON file.

        Args:
            path: file with a JSON object of settings.
            method: overrides the method of the file; the settings of other methods are dropped.

        Raises:
            ConfigError: the file cannot be read, or has an unknown name or an invalid value.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"config file {path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config file {path} is not a JSON object of settings")
        values = with_legacy_defaults(values)
        if method is not None:
            values |= for_method(method)
        elif isinstance(values.get("method"), str):
            values = for_method(values["method"]) | values
        try:
            return self.replace(**values)
        except ConfigError as error:
            raise ConfigError(f"config file {path}: {error}") from error


def with_legacy_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved settings without removed settings, and with those added since at their legacy defaults."""
    settings = without_removed(values)
    for section in typing.get_type_hints(TrainConfig).values():
        traits = {item.name: item.metadata for item in fields(section)}
        legacy = {name: item["legacy_default"] for name, item in traits.items() if "legacy_default" in item}
        # A file that lacks older settings too is not a saved config: what it lacks has the current default.
        if traits.keys() - legacy.keys() <= settings.keys():
            settings = {**legacy, **settings}
    return settings


def setting_hints() -> dict[str, Any]:
    """Return the type of every training setting by name."""
    sections = typing.get_type_hints(TrainConfig).values()
    return {name: hint for section in sections for name, hint in typing.get_type_hints(section).items()}


def settings_with(trait: str, *values: str) -> tuple[str, ...]:
    """Return the names of the training settings with a trait, in their order.

    Args:
        trait: a name of `Traits`, or `is_path` for every setting with a path or hub id.
        values: only settings with one of these values of the trait.

    Raises:
        KeyError: an unknown trait.
    """
    if trait not in {"is_path", *Traits.__annotations__}:
        raise KeyError(trait)
    names = []
    for section in typing.get_type_hints(TrainConfig).values():
        for item in fields(section):
            traits = {"is_path": item.metadata.get("path_kind", "part") != "part", **item.metadata}
            value = traits.get(trait, False)
            if value in values if values else value:
                names.append(item.name)
    return tuple(names)


def read_setting(name: str, text: str) -> Any:
    """Parse the value of a training setting from `text`.

    Raises:
        ConfigError: an unknown name or an invalid value.
    """
    hint = setting_hints().get(name)
    if hint is None:
        advice = why_removed(name) or "; see `train --help-all` for all names"
        raise ConfigError(f"unknown setting {name!r}{advice}")
    return read_value(name, hint, text)


def preset_names() -> tuple[str, ...]:
    """Return the names of the included presets in alphabetical order."""
    return tuple(sorted(file.stem for file in _PRESETS.glob("*.json")))


def preset_file(name: str) -> Path:
    """Return the JSON file of a preset.

    Raises:
        ConfigError: an unknown preset; the message lists all presets.
    """
    if name not in preset_names():
        remedy = "; to read a file, use --config" if Path(name).is_file() else ""
        raise ConfigError(f"--preset {name} does not exist; available: {', '.join(preset_names())}{remedy}")
    return _PRESETS / f"{name}.json"
