"""The metrics of a comparison: losses on fixed images and metrics of pictures, for the base and for each run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.losses import UNGROUPED, LossEvaluator
from flatlora_diffusion.compare.pictures import Key, PictureGenerator
from flatlora_diffusion.compare.progress import Piece
from flatlora_diffusion.compare.trajectory import TrajectoryPoint
from flatlora_diffusion.config import DEFAULT_SIGMA
from flatlora_diffusion.data.dataset import Sample, metadata_rows
from flatlora_diffusion.evaluation.encoders import JUDGE, Encoder
from flatlora_diffusion.evaluation.judge import NAME_PROMPT, Judge
from flatlora_diffusion.evaluation.metrics import Metric, Reference, encode_reference, judge_metrics, picture_metrics
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
    Metric("loss_increases", "loss rise", "lower", _RISE, 6),
    Metric("seconds_per_step", "seconds per step", "lower", "Median over the run.", 3),
    Metric("peak_memory_mib", "peak memory, MiB", "lower", "Of the training process.", 0),
)
_LOSSES = {TRAIN: "clean_train_loss", HELDOUT: "heldout_loss", FORGETTING: "forgetting_loss"}

MetricValues = dict[str, float]


@dataclass(frozen=True)
class PromptSets:
    """Prompts in the learned style, prompts that the LoRA should leave alone, seeds and guidance of the pictures."""

    style: tuple[str, ...]
    unrelated: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float

    @property
    def few(self) -> PromptSets:
        """What is drawn along a run."""
        return replace(
            self, style=self.style[:ALONG_THE_WAY], unrelated=self.unrelated[:ALONG_THE_WAY], seeds=self.seeds[:1]
        )

    def keys(self, prompts: Sequence[str]) -> list[Key]:
        return [(prompt, seed) for prompt in prompts for seed in self.seeds]


@dataclass(frozen=True)
class ScoringModels:
    """The models that look at pictures."""

    encoders: Sequence[Encoder]
    judge: Judge | None = None
    lpips: Distance | None = None


class RunEvaluator:
    """Measures runs under conditions that are the same for all of them."""

    def __init__(
        self,
        loss_evaluator: LossEvaluator,
        generator: PictureGenerator,
        prompts: PromptSets,
        scoring_models: ScoringModels,
        training: Sequence[Image.Image],
        heldout: Mapping[str, Image.Image],
        names: Mapping[str, str],
    ) -> None:
        """`training` are the training images as they are seen, `heldout` those of some of the style's prompts.

        `names` has the name of the thing that a prompt describes, where it is known.
        """
        self._loss_evaluator, self._generator = loss_evaluator, generator
        self.prompts, self._scoring_models, self.names = prompts, scoring_models, names
        self.training, self.heldout = training, heldout

    @cached_property
    def _references(self) -> dict[str, Reference]:
        """What pictures are compared with, by the prefix of their metrics; made when it is first asked for."""
        prompts, encoders = self.prompts, self._scoring_models.encoders
        base = self._generator.generate(None, prompts.keys((*prompts.style, *prompts.unrelated)))
        texts = {prompt: NAME_PROMPT.format(name) for prompt, name in self.names.items()}
        references: dict[str, Reference] = {}
        for encoder in encoders:
            prefix = "" if len(encoders) == 1 else f"{Path(encoder.name).name}_"
            known = texts if encoder.name == JUDGE else {}
            references[prefix] = encode_reference(encoder, self.training, base, self.heldout, known)
        return references

    def base(self) -> MetricValues:
        """The base's metrics, without those that only a LoRA has."""
        return self._losses(None, 1.0) | self._of_pictures(None, self.prompts)

    def run(self, planned: PlannedRun) -> MetricValues:
        """All metrics of a finished run."""
        steps = planned.run.steps()
        rises = self._loss_evaluator.rises(planned.lora, TRAIN, DEFAULT_SIGMA, RISE_DRAWS)
        return {
            **self._losses(planned.lora, 1.0),
            "loss_increases": statistics.fmean(rises),
            "seconds_per_step": _seconds_per_step(steps),
            "peak_memory_mib": max(event["memory"] for event in steps) / 2**20,
            **self._of_pictures(planned.lora, self.prompts),
        }

    def losses(self, planned: PlannedRun) -> MetricValues:
        """The losses of a finished run alone."""
        return self._losses(planned.lora, 1.0)

    def image_losses(self, lora: Path | None) -> dict[str, list[float]]:
        """The losses that `run` and `base` have the means of, image by image."""
        by_set = self._loss_evaluator.image_losses(lora)
        return {_LOSSES[name]: losses for name, losses in by_set.items()}

    def trajectory(self, planned: PlannedRun) -> list[TrajectoryPoint]:
        """The base, then each checkpoint of the run."""
        seconds = _seconds_per_step(planned.run.steps())
        prefix = next(iter(self._references), "")
        points = []
        for step, lora in ((0, None), *planned.files.items()):
            losses, pictured = self._losses(lora, 1.0), self._of_pictures(lora, self.prompts.few)
            points.append(
                TrajectoryPoint(
                    step,
                    seconds * step,
                    losses["clean_train_loss"],
                    losses["heldout_loss"],
                    pictured.get(f"{prefix}drift"),
                    pictured.get(f"{prefix}memorization"),
                )
            )
        return points

    def strengths(self, planned: PlannedRun) -> dict[float, MetricValues]:
        """The losses of a finished run by the strength of its LoRA, the base's at 0."""
        return {0.0: self._losses(None, 1.0)} | {
            strength: self._losses(planned.lora, strength) for strength in STRENGTHS
        }

    def groups(self, lora: Path | None) -> MetricValues:
        """The held-out loss of each group of concepts."""
        by_group = self._loss_evaluator.losses(lora)[HELDOUT]
        return {group: loss for group, loss in by_group.items() if group != UNGROUPED}

    def pictures(self, lora: Path | None, seed: int) -> list[Path]:
        """The files of the pictures of the style's prompts with one seed."""
        keys = [(prompt, seed) for prompt in self.prompts.style]
        self._generator.generate(lora, keys)
        return self._generator.files(lora, keys)

    def at_strengths(self, lora: Path, prompt: str, strengths: Sequence[float]) -> list[Image.Image]:
        """The pictures of `prompt`, with the first seed, by the LoRA at each strength; at 0 by the base."""
        key = (prompt, self.prompts.seeds[0])
        return [self._generator.generate(lora if at else None, [key], at)[key] for at in strengths]

    def to_draw(self, name: str, lora: Path | None, seed: int) -> Piece:
        """What `pictures` needs."""
        keys = [(prompt, seed) for prompt in self.prompts.style]
        return self._drawing(f"drawing with {name}", lora, keys)

    def to_draw_at_strengths(
        self, name: str, lora: Path, prompts: Sequence[str], strengths: Sequence[float]
    ) -> list[Piece]:
        """What `at_strengths` needs for each of `prompts`, but for strengths 0 and 1, which `pictures` draws."""
        keys = [(prompt, self.prompts.seeds[0]) for prompt in prompts]
        others = [at for at in strengths if at not in (0, 1)]
        return [self._drawing(f"drawing with {name} at {at:g}", lora, keys, at) for at in others]

    def to_measure_base(self) -> list[Piece]:
        """What `base` and all that is compared with it need."""
        keys = self.prompts.keys((*self.prompts.style, *self.prompts.unrelated))
        return [self._loss(BASE, None, 1.0), self._drawing(f"{BASE}: pictures", None, keys)]

    def to_measure(self, planned: PlannedRun) -> list[Piece]:
        """What `run`, `trajectory` and `strengths` need, beside the base."""
        name, lora = planned.label, planned.lora
        rises = lora, TRAIN, DEFAULT_SIGMA, RISE_DRAWS
        keys = self.prompts.keys((*self.prompts.style, *self.prompts.unrelated))
        pieces = [self._loss(name, lora, 1.0), self._drawing(f"{name}: pictures", lora, keys)]
        pieces.append(
            Piece(
                f"{name}: flatness",
                self._loss_evaluator.rises_left(*rises),
                partial(self._loss_evaluator.rises, *rises),
            )
        )
        few = self.prompts.few
        for step, file in planned.files.items():
            if file != lora:
                pieces.append(self._loss(f"{name}, step {step}", file, 1.0))
                pieces.append(
                    self._drawing(f"{name}, step {step}: pictures", file, few.keys((*few.style, *few.unrelated)))
                )
        others = [strength for strength in STRENGTHS if strength != 1]
        return pieces + [self._loss(f"{name}, strength {strength:g}", lora, strength) for strength in others]

    def to_measure_null(self, planned: PlannedRun) -> list[Piece]:
        """What `losses` and `pictures` need."""
        name, lora = planned.arm.name, planned.lora
        keys = [(prompt, self.prompts.seeds[0]) for prompt in self.prompts.style]
        return [self._loss(name, lora, 1.0), self._drawing(f"{name}: pictures", lora, keys)]

    def _loss(self, name: str, lora: Path | None, strength: float) -> Piece:
        do = partial(self._loss_evaluator.losses, lora, strength)
        return Piece(f"{name}: losses", self._loss_evaluator.losses_left(lora, strength), do)

    def _drawing(self, what: str, lora: Path | None, keys: Sequence[Key], strength: float = 1.0) -> Piece:
        model = lora, keys, strength
        return Piece(what, self._generator.left(*model), partial(self._generator.generate, *model))

    def _losses(self, lora: Path | None, strength: float) -> MetricValues:
        by_set = self._loss_evaluator.losses(lora, strength)
        return {_LOSSES[name]: by_group[UNGROUPED] for name, by_group in by_set.items()}

    def _of_pictures(self, lora: Path | None, prompts: PromptSets) -> MetricValues:
        style = self._generator.generate(lora, prompts.keys(prompts.style))
        unrelated = self._generator.generate(lora, prompts.keys(prompts.unrelated))
        values: MetricValues = {}
        for prefix, reference in self._references.items():
            of_encoder = picture_metrics(reference, style, unrelated or None)
            values |= {prefix + key: value for key, value in of_encoder.items()}
        named = {key: image for key, image in style.items() if key[0] in self.names}
        if self._scoring_models.judge is not None and named:
            candidates = sorted(set(self.names.values()))
            values |= judge_metrics(self._scoring_models.judge, named, self.names, candidates)
        if self._scoring_models.lpips is not None and len(prompts.seeds) > 1:
            values["lpips_diversity"] = lpips_diversity(self._scoring_models.lpips, style)
        return values


def names_of(folder: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """The name of the thing that each caption describes: the field `name` of its image's line in metadata.jsonl."""
    names = {row["file_name"]: str(row["name"]) for row in metadata_rows(folder).values() if "name" in row}
    return {sample.caption: names[sample.id] for sample in samples if sample.id in names}


def _seconds_per_step(steps: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(event["seconds"] for event in steps)
