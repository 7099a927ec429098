"""Import of a LoRA file as a finished run, so that it can be compared.

The file is only read: its header is checked first, its shapes must fit the base, and a converted copy is stored. The
run folder has an `imported.json` that describes the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flatlora_diffusion.config import ConfigError, ImportConfig, ModelConfig
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.model_paths import available_bases
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.storage.saved_config import portable

from ..process.file_cache import file_hash
from ..process.json_file import read_json
from ..process.launch import Launch
from ..process.temporary_folders import temporary_folder
from .names import IMPORTED, folder_of
from .runs import RunStore

MAX_BYTES = 2**30  # what one upload may have; a LoRA of rank 128 on all of SDXL in fp16 has three quarters of it
_FILE = "imported.json"


@dataclass(frozen=True)
class Origin:
    """The imported file: the user's name for it, its hash, its layers and their ranks."""

    name: str
    sha256: str
    layers: int
    ranks: list[int]


@dataclass(frozen=True)
class Imported:
    """A new imported run: its id, its layers, and the number of tensors that belong to no layer."""

    run: str
    layers: int
    unknown: int


def known_bases(runs: RunStore) -> list[str]:
    """The bases of existing runs, newest first, then the included bases."""
    saved = [read_json(RunDir(run.folder).config_file).get("pretrained_model_name_or_path") for run in runs.all()]
    given = [runs.settings(run.id).get("pretrained_model_name_or_path") for run in runs.all()]
    return list(dict.fromkeys(base for base in [*given, *saved, *available_bases()] if base))


def import_lora_file(runs: RunStore, file: Path, base: str) -> Imported:
    """Check and store an uploaded file as a LoRA of `base`. Raises ConfigError if it cannot be used."""
    from flatlora_diffusion.lora_tools.converting import import_file, read_lora_file

    _check_upload(runs, file, base)
    with _folder_beside(runs) as folder:
        with _said_of(file):
            lora = read_lora_file(str(file), base)
            import_file(ImportConfig(file=str(file), base=base, output=str(folder / LORA_FILE)))
        settings = _settings(runs, base)
        ranks = sorted({layer.rank for layer in lora.layers})
        _describe(folder, settings, Origin(file.name, file_hash(file), len(lora.layers), ranks))
        run_id = runs.paths.reserve(file.stem)
        os.replace(folder, folder_of(runs.folder, run_id))
    launch = Launch(runs.paths.next_launch(run_id).folder)
    launch.folder.mkdir(parents=True)
    write_json(launch.settings_file, settings)  # with the place of the base, which the run folder does not tell
    return Imported(run_id, len(lora.layers), len(lora.unknown))


def origin_of(folder: Path) -> Origin | None:
    """The file that a run was imported from; None for a trained run."""
    values = read_json(folder / _FILE)
    return Origin(**values) if values else None


def _check_upload(runs: RunStore, file: Path, base: str) -> None:
    if file.suffix.lower() != ".safetensors":
        raise ConfigError(f"{file.name} is no .safetensors file; other formats can hold code and are not read")
    if not file.is_file():
        raise ConfigError(f"{file.name} is not here any more, as uploads are kept for an hour; drop it again")
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{file.name} has {file.stat().st_size / 2**20:.0f} MiB; {MAX_BYTES // 2**20} at most")
    if not base.strip():
        raise ConfigError("the base is missing; say which base the LoRA is for")
    for run in runs.all():
        origin = origin_of(run.folder)
        if origin is not None and origin.sha256 == file_hash(file):
            raise ConfigError(f"{file.name} is among the runs already, as {run.name}")


@contextmanager
def _said_of(file: Path) -> Iterator[None]:
    """Name the file in errors as the user does, not by the path of the upload."""
    try:
        yield
    except ConfigError as error:
        text = str(error).replace(str(file), file.name).replace(LORA_FILE, file.name)
        raise ConfigError(text.replace("which --base can name", "choose that one")) from error


@contextmanager
def _folder_beside(runs: RunStore) -> Iterator[Path]:
    """A temporary folder on the disk of the runs, to be renamed when it is complete."""
    with temporary_folder(runs.temporary) as place:
        folder = place / "run"
        folder.mkdir()
        yield folder


def _settings(runs: RunStore, base: str) -> dict[str, Any]:
    """How the base is loaded: as for the newest run on it."""
    names = [item.name for item in fields(ModelConfig)]
    for run in runs.all():
        values = runs.settings(run.id)
        if values.get("pretrained_model_name_or_path") == base and values.get("resolution"):
            model = {name: values[name] for name in names if name in values}
            return {"method": IMPORTED, **model, "resolution": values["resolution"]}
    native = family_of(ModelConfig(base)).sizes(ModelConfig(base)).native
    return {"method": IMPORTED, "pretrained_model_name_or_path": base, "resolution": native}


def _describe(folder: Path, settings: Mapping[str, Any], origin: Origin) -> None:
    """Write the files that make a folder with a LoRA a finished run."""
    run = RunDir(folder)
    write_json(run.config_file, portable(settings))
    write_json(run.manifest_file, [])
    write_json(folder / _FILE, asdict(origin))
    run.events_file.write_text(json.dumps({"event": "finished", "step": 0}) + "\n", encoding="utf-8")
