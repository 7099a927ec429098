"""Settings in a run folder: saved without tokens and absolute paths, compared when a run is resumed."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flatlora_diffusion.config import SAMPLES, ConfigError, settings_with

_PATHS = settings_with("is_path")
_SECRETS = settings_with("is_secret")
_FREE = settings_with("free_on_resume")  # images are compared by their hashes instead
_SAMPLES_MARK = "samples/"
_TRUNCATED = "..."  # replaces the folders of a path that is saved as its last name


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` as it is saved: without tokens, absolute paths and `resume_from_checkpoint`.

    A path below the working folder becomes relative to it, one below the program's samples `samples/...`, one below
    the home folder `~/...`, any other `.../NAME`.
    """
    values = {name: value for name, value in config.items() if name not in _SECRETS}
    for name in _PATHS:
        value = values.get(name)
        if isinstance(value, str) and os.path.isabs(value):
            values[name] = _short(Path(value))
    return values | ({"resume_from_checkpoint": None} if "resume_from_checkpoint" in values else {})


def expand_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved settings with `~/...` and `samples/...` replaced by the paths on this machine."""
    return {
        name: _expand_path(value) if name in _PATHS and isinstance(value, str) else value
        for name, value in config.items()
    }


def check_paths(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for paths that were saved as their last name only."""
    truncated = [name for name in _PATHS if is_truncated_path(config.get(name))]
    if truncated:
        flags = ", ".join(f"--{name} (it was {config[name]})" for name in truncated)
        raise ConfigError(
            f"a saved run has no paths outside the working folder and the home folder: give {flags} again"
        )


def is_truncated_path(path: str | None) -> bool:
    """Whether only the last name of the path was saved."""
    return path is not None and path.startswith(f"{_TRUNCATED}/")


def changed_names(now: Mapping[str, Any], saved: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Return the names of changed settings that affect the steps already taken, without those in `ignored`."""
    return [
        name
        for name, value in now.items()
        if name not in _FREE and name not in ignored and not _is_same(name, value, saved.get(name))
    ]


def _is_same(name: str, now: Any, saved: Any) -> bool:
    """Paths are equal if one is the end of the other: their contents are compared by hash."""
    if now == saved or name not in _PATHS or now is None or saved is None:
        return bool(now == saved)
    now_parts, saved_parts = _parts(now), _parts(saved)
    count = min(len(now_parts), len(saved_parts))
    return count > 0 and now_parts[-count:] == saved_parts[-count:]


def _parts(path: str) -> tuple[str, ...]:
    parts = (Path(path).resolve() if Path(path).exists() else PurePosixPath(path.replace("\\", "/"))).parts
    return tuple(part for part in parts if part not in (_TRUNCATED, "..", "~"))


def _expand_path(path: str) -> str:
    """A folder `samples/...` in the working folder takes precedence over the program's."""
    if path.startswith("~/"):
        return str(Path(path).expanduser())
    sample = SAMPLES / path.removeprefix(_SAMPLES_MARK)
    return str(sample) if path.startswith(_SAMPLES_MARK) and sample.exists() and not Path(path).exists() else path


def _short(path: Path) -> str:
    for root, mark in ((SAMPLES, _SAMPLES_MARK), (Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(root):
            return mark + path.relative_to(root).as_posix()
    return f"{_TRUNCATED}/{path.name}"
