"""Measures the metrics of a comparison: losses on fixed images, and metrics of pictures, of the base and each run."""

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
from flatlora_diffusion.compare.progress import WorkItem
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
INCREASE_DRAWS = 8
TRAJECTORY_PROMPTS = 4  # prompts of each kind that are drawn at every checkpoint
_INCREASE_HELP = f"Increase of the training loss under noise of sigma {DEFAULT_SIGMA} on the adapted layers (Eq. 7)."
OWN_METRICS = (
    Metric("heldout_loss", "held-out loss", "lower", "Denoising loss on images of the style never trained on.", 5),
    Metric(
        "clean_train_loss", "unperturbed train loss", "lower", "The same on the training images, without noise.", 5
    ),
    Metric("forgetting_loss", "forgetting", "lower", "The same on images of concepts that the base already knew.", 5),
    Metric("loss_rise", "loss increase", "lower", _INCREASE_HELP, 6),
    Metric("seconds_per_step", "seconds per step", "lower", "Median over the run.", 3),
    Metric("peak_memory_mib", "peak memory, MiB", "lower", "Of the training process.", 0),
)
_LOSSES = {TRAIN: "clean_train_loss", HELDOUT: "heldout_loss", FORGETTING: "forgetting_loss"}

MetricValues = dict[str, float]


@dataclass(frozen=True)
class PromptSets:
    """Prompts of the learned style, unrelated prompts that the LoRA should not affect, seeds and guidance."""

    style: tuple[str, ...]
    unrelated: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float

    @property
    def trajectory_subset(self) -> PromptSets:
        """The prompts and the seed that are drawn at every checkpoint."""
        style, unrelated = self.style[:TRAJECTORY_PROMPTS], self.unrelated[:TRAJECTORY_PROMPTS]
        return replace(self, style=style, unrelated=unrelated, seeds=self.seeds[:1])

    def keys(self, prompts: Sequence[str]) -> list[Key]:
        return [(prompt, seed) for prompt in prompts for seed in self.seeds]


@dataclass(frozen=True)
class ScoringModels:
    """The models that score pictures."""

    encoders: Sequence[Encoder]
    judge: Judge | None = None
    lpips: Distance | None = None


class RunEvaluator:
    """Measures runs under equal conditions.

    Args:
        training: The training images at the pictures' resolution.
        heldout: Real images by prompt, for the style's prompts that have one.
        names: The name of the concept that a prompt describes, by prompt.
    """

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
        self._loss_evaluator, self._generator = loss_evaluator, generator
        self.prompts, self._scoring_models, self.names = prompts, scoring_models, names
        self.training, self.heldout = training, heldout

    @cached_property
    def _references(self) -> dict[str, Reference]:
        """The references that pictures are compared with, by the prefix of the metrics."""
        prompts, encoders = self.prompts, self._scoring_models.encoders
        base = self._generator.generate(None, prompts.keys((*prompts.style, *prompts.unrelated)))
        texts = {prompt: NAME_PROMPT.format(name) for prompt, name in self.names.items()}
        references: dict[str, Reference] = {}
        for encoder in encoders:
            prefix = "" if len(encoders) == 1 else f"{Path(encoder.name).name}_"
            encoder_texts = texts if encoder.name == JUDGE else {}
            references[prefix] = encode_reference(encoder, self.training, base, self.heldout, encoder_texts)
        return references

    def base_metrics(self) -> MetricValues:
        """The metrics of the base."""
        return self.losses(None) | self._picture_metrics(None, self.prompts)

    def run_metrics(self, planned: PlannedRun) -> MetricValues:
        """All metrics of a finished run."""
        steps = planned.run.steps()
        increases = self._loss_evaluator.loss_increases(planned.lora, TRAIN, DEFAULT_SIGMA, INCREASE_DRAWS)
        return {
            **self.losses(planned.lora),
            "loss_rise": statistics.fmean(increases),
            "seconds_per_step": _seconds_per_step(steps),
            "peak_memory_mib": max(event["memory"] for event in steps) / 2**20,
            **self._picture_metrics(planned.lora, self.prompts),
        }

    def losses(self, lora: Path | None, strength: float = 1.0) -> MetricValues:
        """Only the losses."""
        by_set = self._loss_evaluator.losses(lora, strength)
        return {_LOSSES[name]: by_group[UNGROUPED] for name, by_group in by_set.items()}

    def image_losses(self, lora: Path | None) -> dict[str, list[float]]:
        """The losses of each image, by the key of the metric that is their mean."""
        by_set = self._loss_evaluator.image_losses(lora)
        return {_LOSSES[name]: losses for name, losses in by_set.items()}

    def trajectory(self, planned: PlannedRun) -> list[TrajectoryPoint]:
        """Measure the base, then each checkpoint of the run."""
        seconds = _seconds_per_step(planned.run.steps())
        prefix = next(iter(self._references), "")
        points = []
        for step, lora in ((0, None), *planned.files.items()):
            losses = self.losses(lora)
            pictures = self._picture_metrics(lora, self.prompts.trajectory_subset)
            points.append(
                TrajectoryPoint(
                    step,
                    seconds * step,
                    losses["clean_train_loss"],
                    losses["heldout_loss"],
                    pictures.get(f"{prefix}drift"),
                    pictures.get(f"{prefix}memorization"),
                )
            )
        return points

    def strengths(self, planned: PlannedRun) -> dict[float, MetricValues]:
        """The losses of a finished run by the strength of its LoRA; strength 0 is the base."""
        return {0.0: self.losses(None)} | {strength: self.losses(planned.lora, strength) for strength in STRENGTHS}

    def groups(self, lora: Path | None) -> MetricValues:
        """The held-out loss of each group of concepts."""
        by_group = self._loss_evaluator.losses(lora)[HELDOUT]
        return {group: loss for group, loss in by_group.items() if group != UNGROUPED}

    def pictures(self, lora: Path | None) -> list[Path]:
        """Draw the style's prompts with the first seed; return the files."""
        keys = self._first_keys(self.prompts.style)
        self._generator.generate(lora, keys)
        return self._generator.files(lora, keys)

    def pictures_at_strengths(self, lora: Path, prompt: str, strengths: Sequence[float]) -> list[Image.Image]:
        """Draw `prompt` with the first seed and the LoRA at each strength; strength 0 is the base."""
        (key,) = self._first_keys([prompt])
        return [self._generator.generate(lora if strength else None, [key], strength)[key] for strength in strengths]

    def drawing_item(self, name: str, lora: Path | None) -> WorkItem:
        """The work of `pictures`."""
        return self._drawing(f"drawing with {name}", lora, self._first_keys(self.prompts.style))

    def strength_items(
        self, name: str, lora: Path, prompts: Sequence[str], strengths: Sequence[float]
    ) -> list[WorkItem]:
        """The work of `pictures_at_strengths` for each prompt, except strengths 0 and 1, which `pictures` draws."""
        return [
            self._drawing(f"drawing with {name} at {strength:g}", lora, self._first_keys(prompts), strength)
            for strength in strengths
            if strength not in (0, 1)
        ]

    def base_items(self) -> list[WorkItem]:
        """The work of `base_metrics` and of the references."""
        return [self._loss(BASE, None), self._drawing(f"{BASE}: pictures", None, self._all_keys(self.prompts))]

    def measurement_items(self, planned: PlannedRun) -> list[WorkItem]:
        """The work of `run_metrics`, `trajectory` and `strengths`, without the base's."""
        name, lora = planned.label, planned.lora
        increase = lora, TRAIN, DEFAULT_SIGMA, INCREASE_DRAWS
        items = [
            self._loss(name, lora),
            self._drawing(f"{name}: pictures", lora, self._all_keys(self.prompts)),
            WorkItem(
                f"{name}: flatness",
                self._loss_evaluator.increase_passes(*increase),
                partial(self._loss_evaluator.loss_increases, *increase),
            ),
        ]
        keys = self._all_keys(self.prompts.trajectory_subset)
        for step, file in planned.files.items():
            if file != lora:
                items.append(self._loss(f"{name}, step {step}", file))
                items.append(self._drawing(f"{name}, step {step}: pictures", file, keys))
        others = [strength for strength in STRENGTHS if strength != 1]
        return items + [self._loss(f"{name}, strength {strength:g}", lora, strength) for strength in others]

    def control_items(self, planned: PlannedRun) -> list[WorkItem]:
        """The work of `losses` and `pictures` for a control."""
        name, lora = planned.arm.name, planned.lora
        keys = self._first_keys(self.prompts.style)
        return [self._loss(name, lora), self._drawing(f"{name}: pictures", lora, keys)]

    def _first_keys(self, prompts: Sequence[str]) -> list[Key]:
        return [(prompt, self.prompts.seeds[0]) for prompt in prompts]

    @staticmethod
    def _all_keys(prompts: PromptSets) -> list[Key]:
        return prompts.keys((*prompts.style, *prompts.unrelated))

    def _loss(self, name: str, lora: Path | None, strength: float = 1.0) -> WorkItem:
        run = partial(self._loss_evaluator.losses, lora, strength)
        return WorkItem(f"{name}: losses", self._loss_evaluator.loss_passes(lora, strength), run)

    def _drawing(self, label: str, lora: Path | None, keys: Sequence[Key], strength: float = 1.0) -> WorkItem:
        model = lora, keys, strength
        passes = self._generator.passes(*model)
        pictures = passes // self._generator.passes_per_picture
        return WorkItem(label, passes, partial(self._generator.generate, *model), pictures)

    def _picture_metrics(self, lora: Path | None, prompts: PromptSets) -> MetricValues:
        style = self._generator.generate(lora, prompts.keys(prompts.style))
        unrelated = self._generator.generate(lora, prompts.keys(prompts.unrelated))
        values: MetricValues = {}
        for prefix, reference in self._references.items():
            metrics = picture_metrics(reference, style, unrelated or None)
            values |= {prefix + key: value for key, value in metrics.items()}
        named = {key: image for key, image in style.items() if key[0] in self.names}
        if self._scoring_models.judge is not None and named:
            candidates = sorted(set(self.names.values()))
            values |= judge_metrics(self._scoring_models.judge, named, self.names, candidates)
        if self._scoring_models.lpips is not None and len(prompts.seeds) > 1:
            values["lpips_diversity"] = lpips_diversity(self._scoring_models.lpips, style)
        return values


def names_of(folder: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """The name of the concept that each caption describes: the field `name` of the image's line in metadata.jsonl."""
    names = {row["file_name"]: str(row["name"]) for row in metadata_rows(folder).values() if "name" in row}
    return {sample.caption: names[sample.id] for sample in samples if sample.id in names}


def _seconds_per_step(steps: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(event["seconds"] for event in steps)
