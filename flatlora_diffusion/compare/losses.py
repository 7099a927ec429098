"""Measures and caches the losses of LoRA files on fixed image sets, at any strength."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flatlora_diffusion.config import RunError
from flatlora_diffusion.data.dataset import Sample, metadata_rows
from flatlora_diffusion.evaluation.probe import Probe, fixed_probe, loss_increases, probe_losses
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.objective import Objective
from flatlora_diffusion.lora_files.loading import lora_scale, loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.storage.atomic_io import file_sha256, write_text
from flatlora_diffusion.storage.hashing import base_fingerprint

UNGROUPED = "all"
_LOSSES_KEY = "image losses"


@dataclass(frozen=True)
class ImageSet:
    """Captioned images, each with a group such as its concept and with `draws` (noise, timestep) pairs."""

    samples: Sequence[Sample]
    groups: Sequence[str]
    draws: int = 1

    @property
    def size(self) -> int:
        """The number of samples of the denoising loss."""
        return len(self.samples) * self.draws

    @property
    def sha256(self) -> str:
        """The hash of images, captions and draws, in order."""
        rows = [self.draws, *((sample.sha256, sample.caption) for sample in self.samples)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


Losses = dict[str, dict[str, float]]
"""Mean losses by image set and group; the group `all` is the mean over all images of the set."""


class LossEvaluator:
    """Measures and caches the denoising loss of the base with a LoRA file, with the same draws for all LoRAs.

    Args:
        cache: The folder for results.
        text_is_adapted: Encode the captions again with each LoRA.
    """

    def __init__(
        self,
        base: Base,
        objective: Objective,
        sets: Mapping[str, ImageSet],
        resolution: int,
        cache: Path,
        background: str = "white",
        text_is_adapted: bool = False,
    ) -> None:
        self._base, self._objective, self.sets, self._cache = base, objective, sets, cache
        hashes = {name: images.sha256 for name, images in sets.items()}
        identity = [base_fingerprint(base.denoiser), base.clip_skip]
        self._key = json.dumps([*identity, hashes, resolution, background, text_is_adapted])
        self._settings = resolution, background
        self._text_is_adapted = text_is_adapted
        self._probes: dict[str, Probe] = {}

    def losses(self, lora: Path | None, strength: float = 1.0) -> Losses:
        """Measure the losses of the base with `lora`, or of the base alone."""
        return {name: self._by_group(name, losses) for name, losses in self.image_losses(lora, strength).items()}

    def image_losses(self, lora: Path | None, strength: float = 1.0) -> dict[str, list[float]]:
        """Measure the loss of each image (the mean over its draws) by image set, in the order of its samples."""

        def measure() -> Losses:
            return {name: self._by_image(name) for name in self.sets}

        return {
            name: list(losses.values()) for name, losses in self._cached(_LOSSES_KEY, lora, strength, measure).items()
        }

    def loss_passes(self, lora: Path | None, strength: float = 1.0) -> int:
        """The samples that `losses` passes through the denoiser, 0 if they are cached."""
        return 0 if self._is_cached(_LOSSES_KEY, lora, strength) else sum(images.size for images in self.sets.values())

    def loss_increases(self, lora: Path, name: str, sigma: float, draws: int) -> list[float]:
        """Measure the loss increase on the set `name` under each of `draws` perturbations (Eq. 7)."""

        def measure() -> Losses:
            increases = loss_increases(self._base.denoiser, self._objective, self._probe(name), sigma, draws, seed=0)
            return {name: {str(draw): increase for draw, increase in enumerate(increases)}}

        return list(self._cached(_increases_key(name, sigma, draws), lora, 1.0, measure)[name].values())

    def increase_passes(self, lora: Path, name: str, sigma: float, draws: int) -> int:
        """The samples that `loss_increases` passes through the denoiser, 0 if they are cached."""
        return (
            0 if self._is_cached(_increases_key(name, sigma, draws), lora, 1.0) else self.sets[name].size * (1 + draws)
        )

    def _by_image(self, name: str) -> dict[str, float]:
        """The loss of each image by its index in the set."""
        losses = probe_losses(self._base.denoiser, self._objective, self._probe(name))
        return {str(index): loss for index, loss in enumerate(losses.tolist())}

    def _by_group(self, name: str, losses: Sequence[float]) -> dict[str, float]:
        values, groups = torch.tensor(losses, dtype=torch.float64), self.sets[name].groups
        means = {UNGROUPED: float(values.mean())}
        for group in sorted(set(groups)):
            means[group] = float(values[[index for index, name in enumerate(groups) if name == group]].mean())
        return means

    def _probe(self, name: str) -> Probe:
        if self._text_is_adapted or name not in self._probes:
            resolution, background = self._settings
            images = self.sets[name]
            self._probes[name] = fixed_probe(self._base, images.samples, resolution, 0, images.draws, background)
        return self._probes[name]

    def _file(self, measurement: str, lora: Path | None, strength: float) -> Path:
        """The cache file of a measurement."""
        content = "base" if lora is None else file_sha256(lora)
        key = hashlib.sha256(json.dumps([self._key, measurement, content, strength]).encode()).hexdigest()[:32]
        return self._cache / f"{key}.json"

    def _is_cached(self, measurement: str, lora: Path | None, strength: float) -> bool:
        return (lora is None or lora.is_file()) and self._file(measurement, lora, strength).is_file()

    def _cached(self, measurement: str, lora: Path | None, strength: float, measure: Callable[[], Losses]) -> Losses:
        """Return the cached result of `measure` with the LoRA loaded; measure and cache it first if necessary."""
        file = self._file(measurement, lora, strength)
        if not file.is_file():
            losses = measure() if lora is None else self._with_lora(lora, strength, measure)
            self._check_finite(losses, lora, strength)
            self._cache.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(losses) + "\n")
        cached: Losses = json.loads(file.read_text(encoding="utf-8"))
        return cached

    def _check_finite(self, losses: Losses, lora: Path | None, strength: float) -> None:
        """Raise RunError for losses that are not finite, which would make all statistics undefined."""
        bad = [name for name, values in losses.items() if not all(map(math.isfinite, values.values()))]
        if bad:
            model = "the base" if lora is None else f"{lora.parent.name}/{lora.name} at strength {strength:g}"
            dtype = str(self._base.denoiser.dtype).removeprefix("torch.")
            raise RunError(
                f"the losses of {model} on the images {', '.join(bad)} are not finite in {dtype}; repeat the "
                "comparison with another --mixed_precision and --output_dir"
            )

    def _with_lora(self, lora: Path, strength: float, measure: Callable[[], Losses]) -> Losses:
        pipeline, files = self._base.pipeline, [LoraFile(lora)]
        with loras_loaded(pipeline, files), lora_scale(pipeline, files, strength, merge=False):
            return measure()


def _increases_key(name: str, sigma: float, draws: int) -> str:
    return f"rises {name} {sigma} {draws}"


def groups_of(folder: Path, samples: Sequence[Sample]) -> list[str]:
    """The group of each sample: the field `group` of its line in metadata.jsonl, or else `all`."""
    groups = {row["file_name"]: str(row.get("group", UNGROUPED)) for row in metadata_rows(folder).values()}
    return [groups.get(sample.id, UNGROUPED) for sample in samples]
