"""The figures of a comparison: losses on fixed images and metrics of pictures, for the base and for each run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from flatlora_diffusion.compare.arms import Planned
from flatlora_diffusion.compare.losses import UNGROUPED, Meter, metadata_rows
from flatlora_diffusion.compare.pictures import Key, Painter
from flatlora_diffusion.compare.progress import Piece
from flatlora_diffusion.compare.trajectory import Point
from flatlora_diffusion.config import DEFAULT_SIGMA
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.evaluation.encoders import JUDGE, Encoder
from flatlora_diffusion.evaluation.judge import NAME_PROMPT, Judge
from flatlora_diffusion.evaluation.metrics import Metric, Reference, encode_reference, judged, measure
from flatlora_diffusion.evaluation.perceptual import Distance, lpips_diversity

BASE = "the base"
TRAIN, HELDOUT, FORGETTING = "train", "heldout", "forgetting"
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RISE_DRAWS = 8
ALONG_THE_WAY = 4  # prompts of each kind that are drawn at every checkpoint
_RISE = f"Of the train loss under eps (Eq. 7), sigma {DEFAULT_SIGMA}, in the layers that the LoRA adapts."
OWN_METRICS = (
    Metric("heldout_loss", "held-out loss", "lower", "Denoising loss on images of the style never trained on.", 5),
    Metric("clean_train_loss", "clean train loss", "lower", "The same on the training images, without eps.", 5),
    Metric("forgetting_loss", "forgetting", "lower", "The same on images of what the base knew already.", 5),
    Metric("loss_rise", "loss rise", "lower", _RISE, 6),
    Metric("seconds_per_step", "seconds per step", "lower", "Median over the run.", 3),
    Metric("peak_memory_mib", "peak memory, MiB", "lower", "Of the training process.", 0),
)
_LOSSES = {TRAIN: "clean_train_loss", HELDOUT: "heldout_loss", FORGETTING: "forgetting_loss"}

Figures = dict[str, float]


@dataclass(frozen=True)
class Themes:
    """What is drawn: prompts in the learned style, prompts that the LoRA should leave alone, and the seeds."""

    style: tuple[str, ...]
    unrelated: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def few(self) -> Themes:
        """What is drawn along a run."""
        return Themes(self.style[:ALONG_THE_WAY], self.unrelated[:ALONG_THE_WAY], self.seeds[:1])

    def keys(self, prompts: Sequence[str]) -> list[Key]:
        return [(prompt, seed) for prompt in prompts for seed in self.seeds]


@dataclass(frozen=True)
class Seers:
    """The models that look at pictures."""

    encoders: Sequence[Encoder]
    judge: Judge | None = None
    lpips: Distance | None = None


class Examiner:
    """Measures runs under conditions that are the same for all of them."""

    def __init__(
        self,
        meter: Meter,
        painter: Painter,
        themes: Themes,
        seers: Seers,
        training: Sequence[Image.Image],
        heldout: Mapping[str, Image.Image],
        names: Mapping[str, str],
    ) -> None:
        """`training` are the training images as they are seen, `heldout` those of some of the style's prompts.

        `names` says what a prompt shows, where that is known.
        """
        self._meter, self._painter, self.themes, self._seers = meter, painter, themes, seers
        self._names, self._training, self._heldout = names, training, heldout

    @cached_property
    def _references(self) -> dict[str, Reference]:
        """What pictures are compared with, by the prefix of their metrics; made when it is first asked for."""
        themes, seers = self.themes, self._seers
        base = self._painter.paint(None, themes.keys((*themes.style, *themes.unrelated)))
        texts = {prompt: NAME_PROMPT.format(name) for prompt, name in self._names.items()}
        found: dict[str, Reference] = {}
        for encoder in seers.encoders:
            prefix = "" if len(seers.encoders) == 1 else f"{Path(encoder.name).name}_"
            known = texts if encoder.name == JUDGE else {}
            found[prefix] = encode_reference(encoder, self._training, base, self._heldout, known)
        return found

    def base(self) -> Figures:
        """The base's own figures; what only a LoRA has is left out."""
        return self._losses(None, 1.0) | self._of_pictures(None, self.themes)

    def run(self, planned: Planned) -> Figures:
        """All figures of a finished run."""
        steps = _steps(planned)
        return (
            self._losses(planned.lora, 1.0)
            | {
                "loss_rise": statistics.fmean(self._meter.rises(planned.lora, TRAIN, DEFAULT_SIGMA, RISE_DRAWS)),
                "seconds_per_step": _seconds_per_step(steps),
                "peak_memory_mib": max(event["memory"] for event in steps) / 2**20,
            }
            | self._of_pictures(planned.lora, self.themes)
        )

    def losses(self, planned: Planned) -> Figures:
        """The losses of a finished run alone."""
        return self._losses(planned.lora, 1.0)

    def trajectory(self, planned: Planned) -> list[Point]:
        """The base, then each checkpoint of the run."""
        seconds = _seconds_per_step(_steps(planned))
        points = []
        for step, lora in ((0, None), *planned.files.items()):
            losses, seen = self._losses(lora, 1.0), self._of_pictures(lora, self.themes.few)
            prefix = next(iter(self._references), "")
            points.append(
                Point(
                    step,
                    seconds * step,
                    losses["clean_train_loss"],
                    losses["heldout_loss"],
                    seen.get(f"{prefix}drift"),
                    seen.get(f"{prefix}memorization"),
                )
            )
        return points

    def strengths(self, planned: Planned) -> dict[float, Figures]:
        """The losses of a finished run by the strength of its LoRA, the base's at 0."""
        return {0.0: self._losses(None, 1.0)} | {
            strength: self._losses(planned.lora, strength) for strength in STRENGTHS
        }

    def groups(self, lora: Path | None) -> Figures:
        """The held-out loss of each group of concepts."""
        found = self._meter.losses(lora)[HELDOUT]
        return {group: loss for group, loss in found.items() if group != UNGROUPED}

    def pictures(self, lora: Path | None, seed: int) -> list[Path]:
        """The files of the pictures of the style's prompts with one seed."""
        keys = [(prompt, seed) for prompt in self.themes.style]
        self._painter.paint(lora, keys)
        return self._painter.files(lora, keys)

    def to_draw(self, name: str, lora: Path | None, seed: int) -> Piece:
        """What `pictures` needs."""
        keys = [(prompt, seed) for prompt in self.themes.style]
        return self._drawing(f"drawing with {name}", lora, keys)

    def to_measure_base(self) -> list[Piece]:
        """What `base` and all that is compared with it need."""
        keys = self.themes.keys((*self.themes.style, *self.themes.unrelated))
        return [self._loss(BASE, None, 1.0), self._drawing(f"{BASE}: pictures", None, keys)]

    def to_measure(self, planned: Planned) -> list[Piece]:
        """What `run`, `trajectory` and `strengths` need, beside the base."""
        name, lora = planned.label, planned.lora
        rises = lora, TRAIN, DEFAULT_SIGMA, RISE_DRAWS
        keys = self.themes.keys((*self.themes.style, *self.themes.unrelated))
        pieces = [self._loss(name, lora, 1.0), self._drawing(f"{name}: pictures", lora, keys)]
        pieces.append(Piece(f"{name}: flatness", self._meter.rises_left(*rises), partial(self._meter.rises, *rises)))
        few = self.themes.few
        for step, file in planned.files.items():
            if file != lora:
                pieces.append(self._loss(f"{name}, step {step}", file, 1.0))
                pieces.append(
                    self._drawing(f"{name}, step {step}: pictures", file, few.keys((*few.style, *few.unrelated)))
                )
        others = [strength for strength in STRENGTHS if strength != 1]
        return pieces + [self._loss(f"{name}, strength {strength:g}", lora, strength) for strength in others]

    def to_measure_null(self, planned: Planned) -> list[Piece]:
        """What `losses` and `pictures` need."""
        name, lora = planned.arm.name, planned.lora
        keys = [(prompt, self.themes.seeds[0]) for prompt in self.themes.style]
        return [self._loss(name, lora, 1.0), self._drawing(f"{name}: pictures", lora, keys)]

    def _loss(self, name: str, lora: Path | None, strength: float) -> Piece:
        do = partial(self._meter.losses, lora, strength)
        return Piece(f"{name}: losses", self._meter.losses_left(lora, strength), do)

    def _drawing(self, what: str, lora: Path | None, keys: Sequence[Key]) -> Piece:
        return Piece(what, self._painter.left(lora, keys), partial(self._painter.paint, lora, keys))

    def _losses(self, lora: Path | None, strength: float) -> Figures:
        found = self._meter.losses(lora, strength)
        return {_LOSSES[name]: by_group[UNGROUPED] for name, by_group in found.items()}

    def _of_pictures(self, lora: Path | None, themes: Themes) -> Figures:
        drawn = self._painter.paint(lora, themes.keys(themes.style))
        others = self._painter.paint(lora, themes.keys(themes.unrelated))
        found: Figures = {}
        for prefix, reference in self._references.items():
            found |= {prefix + key: value for key, value in measure(reference, drawn, others or None).items()}
        named = {key: image for key, image in drawn.items() if key[0] in self._names}
        if self._seers.judge is not None and named:
            found |= judged(self._seers.judge, named, self._names, sorted(set(self._names.values())))
        if self._seers.lpips is not None and len(themes.seeds) > 1:
            found["lpips_diversity"] = lpips_diversity(self._seers.lpips, drawn)
        return found


def names_of(folder: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """What each caption of an image folder shows: the field `name` of its image's line in metadata.jsonl."""
    names = {row["file_name"]: str(row["name"]) for row in metadata_rows(folder) if "name" in row}
    return {sample.caption: names[sample.id] for sample in samples if sample.id in names}


def _steps(planned: Planned) -> list[Mapping[str, Any]]:
    return [event for event in planned.run.events() if event["event"] == "step"]


def _seconds_per_step(steps: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(event["seconds"] for event in steps)
