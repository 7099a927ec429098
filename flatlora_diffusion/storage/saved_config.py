"""Settings as a run folder keeps them: no tokens, no absolute paths; and what may change when a run goes on."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flatlora_diffusion.config import SAMPLES, ConfigError, settings_with

_PATHS = settings_with("is_path")
_SECRETS = settings_with("is_secret")
_FREE = settings_with("free_on_resume")  # the images are compared by their hashes
_SAMPLES_MARK = "samples/"
_CUT = "..."  # stands for the folders that a path was saved without


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` to be saved: no tokens, no absolute paths, and a run of its own even if this one was resumed.

    A path below the working folder is saved relative to it, one below the samples that come with the program as
    `samples/...`, one below the home as `~/...`; any other one keeps its last name alone, as `.../NAME`.
    """
    values = {name: value for name, value in config.items() if name not in _SECRETS}
    for name in _PATHS:
        value = values.get(name)
        if isinstance(value, str) and os.path.isabs(value):
            values[name] = _short(Path(value))
    return values | ({"resume_from_checkpoint": None} if "resume_from_checkpoint" in values else {})


def opened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings with the paths below the home and below the samples as this machine has them."""
    return {
        name: _opened(value) if name in _PATHS and isinstance(value, str) else value for name, value in config.items()
    }


def check_paths(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for paths of which a saved config has kept only the last name."""
    cut = [name for name in _PATHS if is_cut_path(config.get(name))]
    if cut:
        flags = ", ".join(f"--{name} (it was {config[name]})" for name in cut)
        raise ConfigError(f"a saved run keeps no paths outside of the working folder and the home: give {flags} again")


def is_cut_path(path: str | None) -> bool:
    """Whether of a saved path only the last name was kept."""
    return path is not None and path.startswith(f"{_CUT}/")


def altered(now: Mapping[str, Any], saved: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """The names of the settings that would alter the steps already taken, those in `but` left out."""
    return [
        name
        for name, value in now.items()
        if name not in _FREE and name not in but and not _is_same(name, value, saved.get(name))
    ]


def _is_same(name: str, now: Any, saved: Any) -> bool:
    """Paths are the same if one ends as the other does: what they hold is compared by its hash."""
    if now == saved or name not in _PATHS or now is None or saved is None:
        return bool(now == saved)
    one, two = _parts(now), _parts(saved)
    count = min(len(one), len(two))
    return count > 0 and one[-count:] == two[-count:]


def _parts(path: str) -> tuple[str, ...]:
    found = (Path(path).resolve() if Path(path).exists() else PurePosixPath(path.replace("\\", "/"))).parts
    return tuple(part for part in found if part not in (_CUT, "..", "~"))


def _opened(path: str) -> str:
    """A folder `samples/...` of the user's own, in the working folder, goes before the program's."""
    if path.startswith("~/"):
        return str(Path(path).expanduser())
    sample = SAMPLES / path.removeprefix(_SAMPLES_MARK)
    return str(sample) if path.startswith(_SAMPLES_MARK) and sample.exists() and not Path(path).exists() else path


def _short(path: Path) -> str:
    for root, mark in ((SAMPLES, _SAMPLES_MARK), (Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(root):
            return mark + path.relative_to(root).as_posix()
    return f"{_CUT}/{path.name}"
