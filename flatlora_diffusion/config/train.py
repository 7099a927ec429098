"""All settings of a training together: how they are read, changed and saved, and what is known of each.

Every setting stands once, with default, bounds and help, in its section: `model.py`, `data.py`, `adapter.py`,
`optim.py`, `members.py`, `run.py` and `perturb.py`. The command line, config.json and the app's form come from here.

Names and defaults are those of diffusers' `train_dreambooth_lora_sdxl.py` wherever that script has the setting.
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
from flatlora_diffusion.config.methods import by_method
from flatlora_diffusion.config.removed import why_removed, without_removed
from flatlora_diffusion.config.sections import Sections
from flatlora_diffusion.config.setting import SAMPLES, ConfigError, Traits, read_value

_PRESETS = SAMPLES / "presets"


@dataclass(frozen=True)
class TrainConfig(Sections):
    """All settings of one training run, frozen."""

    def __post_init__(self) -> None:
        """Refuse settings that exclude each other. Raises ConfigError that names both."""
        check_combinations(self)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its flat name, JSON-able."""
        return {name: value for section in fields(self) for name, value in vars(getattr(self, section.name)).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config with `values` by flat name over the defaults. Raises ConfigError for an unknown name."""
        return cls().replace(**completed(values))

    def replace(self, **values: Any) -> TrainConfig:
        """A copy with the settings `values` by flat name."""
        sections = {}
        left = dict(values)
        for section in fields(self):
            names = {item.name for item in fields(getattr(self, section.name))}
            mine = {name: left.pop(name) for name in list(left) if name in names}
            sections[section.name] = dataclasses.replace(getattr(self, section.name), **mine)
        if left:
            raise ConfigError(f"unknown setting(s): {', '.join(sorted(left))}; see `train --help-all` for all names")
        return TrainConfig(**sections)

    def of_method(self, method: str) -> TrainConfig:
        """This config by a method, without what only others have."""
        return self.replace(**by_method(method))

    def updated_from(self, path: Path, method: str | None = None) -> TrainConfig:
        """This config with the settings of a JSON file over it, by `method` or else by the file's own, if it has one.

        What only other methods have is left open. Raises ConfigError when the file cannot be used.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"config file {path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config file {path} must hold one JSON object of settings")
        values = completed(values)
        if method is not None:
            values |= by_method(method)
        elif isinstance(values.get("method"), str):
            values = by_method(values["method"]) | values
        try:
            return self.replace(**values)
        except ConfigError as error:
            raise ConfigError(f"config file {path}: {error}") from error


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings, with those that their version did not have yet as it worked then.

    A file that leaves out older settings of the section, too, is no saved one: what it does not say is the default.
    """
    whole = without_removed(values)
    for section in typing.get_type_hints(TrainConfig).values():
        before = {item.name: item.metadata["before"] for item in fields(section) if "before" in item.metadata}
        if {item.name for item in fields(section)} - before.keys() <= whole.keys():
            whole = {**before, **whole}
    return whole


def setting_hints() -> dict[str, Any]:
    """The type of every setting of a TrainConfig by flat name."""
    sections = typing.get_type_hints(TrainConfig).values()
    return {name: hint for section in sections for name, hint in typing.get_type_hints(section).items()}


def settings_that(trait: str, *values: str) -> tuple[str, ...]:
    """The names of the training settings with a trait (see `Traits`), or with one of its `values`, in their order.

    `is_path` is true of those that name a place, whether a hub id may stand there or not.
    """
    if trait not in {"is_path", *Traits.__annotations__}:
        raise KeyError(trait)
    names = []
    for section in typing.get_type_hints(TrainConfig).values():
        for item in fields(section):
            traits = {"is_path": item.metadata.get("place", "part") != "part", **item.metadata}
            found = traits.get(trait, False)
            if found in values if values else found:
                names.append(item.name)
    return tuple(names)


def read_setting(name: str, text: str) -> Any:
    """The value that `text` gives a training setting. Raises ConfigError for a name or a value that cannot be."""
    hint = setting_hints().get(name)
    if hint is None:
        advice = why_removed(name) or "; see `train --help-all` for all names"
        raise ConfigError(f"unknown setting {name!r}{advice}")
    return read_value(name, hint, text)


def preset_names() -> tuple[str, ...]:
    """The presets that come with the program, in alphabetical order."""
    return tuple(sorted(file.stem for file in _PRESETS.glob("*.json")))


def preset_file(name: str) -> Path:
    """The JSON file of a preset. Raises ConfigError that lists the presets there are."""
    if name not in preset_names():
        remedy = "; --config takes a file" if Path(name).is_file() else ""
        raise ConfigError(f"--preset {name} does not exist; there are: {', '.join(preset_names())}{remedy}")
    return _PRESETS / f"{name}.json"
