"""Settings, method, name and images for a new run like an existing one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatlora_diffusion.config import METHODS, ConfigError, TrainConfig
from flatlora_diffusion.storage.atomic_io import file_sha256
from flatlora_diffusion.storage.run_dir import RunDir

from ..context import AppContext
from ..dataset.layout import RESTORE_REMOVED
from ..runs.names import IMPORTED
from ..runs.runs import Run


@dataclass(frozen=True)
class Clone:
    """The start of a new run. `messages`: sentences on its images and on differences to the original."""

    name: str
    method: str
    settings: dict[str, Any]
    messages: tuple[str, ...]


def clone_run(context: AppContext, session: str, run_id: str) -> Clone:
    """The clone of a run; images that it had from an upload are the session's after it.

    Raises ConfigError for a LoRA that was imported.
    """
    run, settings = context.runs.get(run_id), context.runs.clone_settings(run_id)
    known = TrainConfig().to_dict()
    method = settings.pop("method", known["method"])
    if method == IMPORTED:
        raise ConfigError(f"{run_id} was imported, not trained here, so there are no settings to clone")
    if method not in METHODS:
        raise ConfigError(f"{run_id} was trained by the method {method!r}, which this version does not have")
    messages, places = _images(context, session, run, settings)
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        messages.append(f"Different: this version has no {', '.join(unknown)}.")
    if settings.get("seed") is None:
        messages.append("Different: the run has no seed, so noise, crops and order will differ.")
    kept = {name: value for name, value in settings.items() if name in known}
    return Clone(run.name, method, kept | places, tuple(messages))


def _images(
    context: AppContext, session: str, run: Run, settings: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """(messages about the run's images, the settings that name them)."""
    folder = settings.get("instance_data_dir")
    dataset = settings.get("dataset_name") or settings.get("dataset_config")
    frozen = context.uploads.frozen_copy(folder)
    if frozen is not None:
        return [_taken(context, session, frozen)], {"instance_data_dir": None}
    if dataset:
        return [f"Its images are those of the data set {dataset}, not those in the Dataset tab."], {}
    if not folder:
        return ["Its images are those in the Dataset tab."], {}
    if not context.allowed_paths.may_read(folder) or not Path(folder).is_dir():
        text = (
            f"Different: its image folder {folder} is not here, or is none that --data_dir allows, so its images are "
            "those in the Dataset tab."
        )
        return [text], {"instance_data_dir": None}
    messages = [f"Its images are those in the folder {folder}, not those in the Dataset tab."]
    gone, count = _changed(RunDir(run.folder), Path(folder))
    if gone:
        messages.append(f"Different: {gone} of the {count} images of the run are not in that folder any more.")
    return messages, {}


def _taken(context: AppContext, session: str, frozen: Path) -> str:
    replaced = context.uploads.replace(session, frozen)
    instead = f" in place of {replaced} that were there, which {RESTORE_REMOVED} returns" if replaced else ""
    return f"Its images and captions ({len(context.uploads.images(session))}) are in the Dataset tab now{instead}."


def _changed(run: RunDir, folder: Path) -> tuple[int, int]:
    """(number of the run's images missing in the folder, number of its images)."""
    had = [row["sha256"] for row in run.manifest()] if run.manifest_file.is_file() else []
    now = {file_sha256(path) for path in folder.iterdir() if path.is_file()} if had else {}
    return sum(one not in now for one in had), len(had)
