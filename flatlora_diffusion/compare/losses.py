"""Losses of a LoRA on fixed image sets, at any strength; measured once for each file and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flatlora_diffusion.data.dataset import METADATA, Sample
from flatlora_diffusion.evaluation.probe import Probe, fixed_probe, loss_rise, probe_losses
from flatlora_diffusion.lora_files.loading import lora_scale, loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.storage.atomic_io import file_sha256, write_text
from flatlora_diffusion.storage.hashing import base_fingerprint

UNGROUPED = "all"
_LOSSES = "image losses"


@dataclass(frozen=True)
class ImageSet:
    """Captioned images to measure on, each in a group (by concept, say) and with `draws` (noise, timestep) pairs."""

    samples: Sequence[Sample]
    groups: Sequence[str]
    draws: int = 1

    @property
    def size(self) -> int:
        """How many samples of the denoising loss it has."""
        return len(self.samples) * self.draws

    @property
    def sha256(self) -> str:
        """The hash of images, captions and draws, in their order."""
        rows = [self.draws, *((sample.sha256, sample.caption) for sample in self.samples)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


Losses = dict[str, dict[str, float]]
"""The mean loss by group, by image set; the group `all` is the mean over all images of the set."""


class LossEvaluator:
    """Measures the denoising loss of the base with a LoRA file, under draws that all LoRAs share; keeps results."""

    def __init__(
        self,
        sdxl: Sdxl,
        objective: Objective,
        sets: Mapping[str, ImageSet],
        resolution: int,
        kept: Path,
        background: str = "white",
        text_is_adapted: bool = False,
    ) -> None:
        """`kept` is the folder for results; with `text_is_adapted` captions are encoded anew with each LoRA."""
        self._sdxl, self._objective, self.sets, self._kept = sdxl, objective, sets, kept
        hashes = {name: images.sha256 for name, images in sets.items()}
        base = [base_fingerprint(sdxl.unet), sdxl.clip_skip]
        self._key = json.dumps([*base, hashes, resolution, background, text_is_adapted])
        self._settings = resolution, background
        self._text_is_adapted = text_is_adapted
        self._probes: dict[str, Probe] = {}

    def losses(self, lora: Path | None, strength: float = 1.0) -> Losses:
        """The losses of the base with `lora`, or of the base alone."""
        return {name: self._by_group(name, losses) for name, losses in self.image_losses(lora, strength).items()}

    def image_losses(self, lora: Path | None, strength: float = 1.0) -> dict[str, list[float]]:
        """The loss of each image, the mean over its draws, by image set in the order of its samples."""

        def measure() -> Losses:
            return {name: self._by_image(name) for name in self.sets}

        return {name: list(losses.values()) for name, losses in self._once(_LOSSES, lora, strength, measure).items()}

    def losses_left(self, lora: Path | None, strength: float = 1.0) -> int:
        """How many samples the UNet has to see for `losses`; 0 when they are kept."""
        return 0 if self._is_kept(_LOSSES, lora, strength) else sum(images.size for images in self.sets.values())

    def rises(self, lora: Path, name: str, sigma: float, draws: int) -> list[float]:
        """How much each of `draws` perturbations (Eq. 7) lifts the loss on the set `name`."""

        def measure() -> Losses:
            rises = loss_rise(self._sdxl.unet, self._objective, self._probe(name), sigma, draws, seed=0)
            return {name: {str(draw): rise for draw, rise in enumerate(rises)}}

        return list(self._once(_rises(name, sigma, draws), lora, 1.0, measure)[name].values())

    def rises_left(self, lora: Path, name: str, sigma: float, draws: int) -> int:
        """How many samples the UNet has to see for `rises`; 0 when they are kept."""
        return 0 if self._is_kept(_rises(name, sigma, draws), lora, 1.0) else self.sets[name].size * (1 + draws)

    def _by_image(self, name: str) -> dict[str, float]:
        """The loss of each image by its place in the set."""
        losses = probe_losses(self._sdxl.unet, self._objective, self._probe(name))
        return {str(place): loss for place, loss in enumerate(losses.tolist())}

    def _by_group(self, name: str, losses: Sequence[float]) -> dict[str, float]:
        each, groups = torch.tensor(losses, dtype=torch.float64), self.sets[name].groups
        means = {UNGROUPED: float(each.mean())}
        for group in sorted(set(groups)):
            means[group] = float(each[[place for place, own in enumerate(groups) if own == group]].mean())
        return means

    def _probe(self, name: str) -> Probe:
        if self._text_is_adapted or name not in self._probes:
            resolution, background = self._settings
            images = self.sets[name]
            self._probes[name] = fixed_probe(self._sdxl, images.samples, resolution, 0, images.draws, background)
        return self._probes[name]

    def _file(self, what: str, lora: Path | None, strength: float) -> Path:
        """Where a result is kept, measured or not."""
        content = "base" if lora is None else file_sha256(lora)
        key = hashlib.sha256(json.dumps([self._key, what, content, strength]).encode()).hexdigest()[:32]
        return self._kept / f"{key}.json"

    def _is_kept(self, what: str, lora: Path | None, strength: float) -> bool:
        return (lora is None or lora.is_file()) and self._file(what, lora, strength).is_file()

    def _once(self, what: str, lora: Path | None, strength: float, measure: Callable[[], Losses]) -> Losses:
        """The kept result of `measure` with the LoRA in place; measured where there is none yet."""
        file = self._file(what, lora, strength)
        if not file.is_file():
            losses = measure() if lora is None else self._with_lora(lora, strength, measure)
            self._kept.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(losses) + "\n")
        kept: Losses = json.loads(file.read_text(encoding="utf-8"))
        return kept

    def _with_lora(self, lora: Path, strength: float, measure: Callable[[], Losses]) -> Losses:
        pipeline, files = self._sdxl.pipeline, [LoraFile(lora)]
        with loras_loaded(pipeline, files), lora_scale(pipeline, files, strength, merge=False):
            return measure()


def _rises(name: str, sigma: float, draws: int) -> str:
    return f"rises {name} {sigma} {draws}"


def groups_of(folder: Path, samples: Sequence[Sample]) -> list[str]:
    """The group of each sample: the field `group` of its line in metadata.jsonl, or `all`."""
    groups = {row["file_name"]: str(row.get("group", UNGROUPED)) for row in metadata_rows(folder)}
    return [groups.get(sample.id, UNGROUPED) for sample in samples]


def metadata_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of an image folder's metadata.jsonl; none without that file."""
    file = folder / METADATA
    lines = file.read_text(encoding="utf-8-sig").split("\n") if file.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]
