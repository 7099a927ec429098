"""Files and folders that a setting from the browser may name: the app's own, and those the operator allowed.

Other paths are rejected before they are accessed, so that nobody learns whether they exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatlora_diffusion.config import INCLUDED_BASES, SAMPLES, ConfigError, TrainConfig, settings_with
from flatlora_diffusion.data.dataset_file import read_dataset_file

from .names import is_run

READ, WRITTEN = settings_with("path_kind", "read"), settings_with("path_kind", "written")
MODELS = settings_with("path_kind", "model")  # or a hub id
PARTS = settings_with("path_kind", "part")  # of a path
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_NO_LOCAL_PATH = ("~", "//", "\\\\")  # somebody's home, and another machine's disk on Windows


class AllowedPaths:
    """The places of an app: `runs` without `private`, `data` of the operator, and the uploads in `frozen`."""

    def __init__(self, runs: Path, private: Sequence[Path], frozen: Path, data: Sequence[Path]) -> None:
        self._runs, self._frozen = runs.resolve(), frozen.resolve()
        self._private = [folder.resolve() for folder in private]
        self._data = [folder.resolve() for folder in data]

    def check(self, config: TrainConfig) -> None:
        """Raises ConfigError for a setting that names a path outside of the allowed ones."""
        settings = config.to_dict()
        for name, value in _given(settings, PARTS):
            if not _is_part(value):
                raise ConfigError(
                    f"{name}={value!r} must be a plain name, or several with '/' between, that leads out of no folder"
                )
        for name, value in _given(settings, MODELS):
            self.check_model(name, value)
        for name, value in _given(settings, READ):
            if not self.may_read(value):
                raise _outside(name, value)
        self._check_listed(config.data.dataset_config)
        for name, value in _given(settings, WRITTEN):
            if not self._is_written(value):
                raise _outside(name, value, ", or name a new folder in the runs folder")

    def _check_listed(self, dataset_config: str | None) -> None:
        """A dataset file that may be read may name folders that may not."""
        if dataset_config is None or not Path(dataset_config).is_file():  # what it is instead, the training says
            return
        for subset in read_dataset_file(Path(dataset_config))[0]:
            if not self.may_read(str(subset.folder)):
                raise _outside("image_dir", str(subset.folder))

    def check_model(self, name: str, value: str) -> None:
        """Raises ConfigError when the setting `name` is neither a place that may be read nor a hub id."""
        if value not in INCLUDED_BASES and not self.may_read(value) and not _is_hub_id(value):
            raise _outside(name, value, ", or give a hub id, OWNER/NAME")

    def may_read(self, text: str) -> bool:
        """Whether the browser may name this place of this computer as something to read."""
        path = _resolved(text)
        if path is None or self._is_private(path):
            return path is not None and path.parent == self._frozen
        return _is_in(path, (SAMPLES, self._runs, *self._data))

    def _is_written(self, text: str) -> bool:
        path = _resolved(text)
        if path is None or self._is_private(path):
            return False
        return _is_in(path, self._data) or self._is_new_in_runs(path)

    def _is_new_in_runs(self, path: Path) -> bool:
        """Whether it is below the runs folder and in no run and nothing of the app's own."""
        if path == self._runs or not path.is_relative_to(self._runs):
            return False
        inner = [path, *path.parents][: len(path.relative_to(self._runs).parts)]
        return not any(folder.name.startswith(".") or is_run(folder) for folder in inner)

    def _is_private(self, path: Path) -> bool:
        return _is_in(path, self._private)


def _given(settings: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, settings[name]) for name in names if settings[name]]


def _resolved(text: str) -> Path | None:
    """The absolute path with links resolved; None for anything but a plain path of this computer."""
    if text.startswith(_NO_LOCAL_PATH) or "://" in text:
        return None
    try:
        return Path(text).resolve()
    except (OSError, ValueError, RuntimeError):  # too long, a null character, links in a circle
        return None


def _is_in(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _is_hub_id(value: str) -> bool:
    """A local folder of this name would be loaded instead of the hub's model, so none may exist."""
    return bool(_HUB_ID.fullmatch(value)) and ".." not in value and not Path(value).exists()


def _is_part(value: str) -> bool:
    is_plain = value.isprintable() and not value.startswith(("/", "~", "-")) and not set(value) & set("\\:")
    return is_plain and ".." not in value.split("/")


def _outside(name: str, value: str, more: str = "") -> ConfigError:
    return ConfigError(
        f"{name}={value!r} is outside of the folders that the browser may name; start the app with --data_dir FOLDER "
        f"to allow another one{more}"
    )
