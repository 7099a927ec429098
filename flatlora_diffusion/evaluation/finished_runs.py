"""Finished runs with the same base and the same training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from flatlora_diffusion.config import ConfigError, ModelConfig, TrainConfig, settings_with
from flatlora_diffusion.data.dataset import SampleSet, manifest
from flatlora_diffusion.lora_files.paths import unique_path_ends
from flatlora_diffusion.storage.atomic_io import file_sha256
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir


@dataclass(frozen=True)
class FinishedRun:
    """A run that has finished; `name` is the shortest end of its path that is unique among the runs."""

    name: str
    folder: Path
    config: TrainConfig
    images: frozenset[tuple[str, str]]
    sha256: str

    @property
    def lora(self) -> Path:
        return self.folder / LORA_FILE


def read_runs(folders: Sequence[str]) -> list[FinishedRun]:
    """Read runs of the same base and images.

    Raises ConfigError with the name of a run that is missing, unfinished, or has another base or other images than the
    first run.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if not paths:
        raise ConfigError("no run was given; give one or more run folders")
    if len(set(paths)) < len(paths):
        raise ConfigError("a run was given twice; give each run folder only once")
    runs = [_read(path, name) for path, name in zip(paths, unique_path_ends(paths), strict=True)]
    for run in runs[1:]:
        _check_same_base(run, runs[0])
        if run.images != runs[0].images:
            raise ConfigError(
                f"run {run.name} was trained on other images or captions than {runs[0].name}; leave one of them out"
            )
    return runs


def check_images(run: FinishedRun, training: SampleSet) -> None:
    """Raise ConfigError if the training images, without class images, are not those of `run`."""
    current = _hashes(manifest(training.samples))
    if not (current <= run.images if run.config.data.with_prior_preservation else current == run.images):
        raise ConfigError(
            f"the training images are not those of run {run.name}: files or captions have changed; give the unchanged "
            "folder as --instance_data_dir"
        )


def _read(folder: Path, name: str) -> FinishedRun:
    run = RunDir(folder)
    if not run.config_file.is_file() or not run.manifest_file.is_file():
        raise ConfigError(f"run {name} is not a run folder: {folder} has no config.json or manifest.json")
    if not run.is_finished:
        raise ConfigError(
            f"run {name} has not finished; finish it with --resume_from_checkpoint latest, or leave it out"
        )
    config, sha256 = TrainConfig.from_dict(run.config()), file_sha256(folder / LORA_FILE)
    return FinishedRun(name, folder, config, _hashes(run.manifest()), sha256)


def _check_same_base(run: FinishedRun, first: FinishedRun) -> None:
    loading = settings_with("loader_only")
    for item in fields(ModelConfig):
        value, expected = getattr(run.config.model, item.name), getattr(first.config.model, item.name)
        if item.name not in loading and value != expected:
            raise ConfigError(
                f"run {run.name} was trained on another base than {first.name}: {item.name}={value!r}, "
                f"not {expected!r}; leave one of them out"
            )


def _hashes(rows: list[dict[str, str]]) -> frozenset[tuple[str, str]]:
    return frozenset((row["sha256"], row["caption_sha256"]) for row in rows)
