"""The flatness measurements at the W' of a run or of the base."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flatlora_diffusion.config import FlatnessConfig
from flatlora_diffusion.evaluation.probe import Probe
from flatlora_diffusion.families.base import Base, eval_mode
from flatlora_diffusion.families.objective import Objective
from flatlora_diffusion.flatness.curvature import Eigenvalue, top_eigenvalues, trace
from flatlora_diffusion.flatness.functional import Estimate, Loss, Metric, Weights, value
from flatlora_diffusion.flatness.landscape import Landscape, landscape, worst_increases
from flatlora_diffusion.flatness.merged_weights import (
    Deltas,
    loss_of_factors,
    loss_on_probe,
    merged,
)
from flatlora_diffusion.flatness.perturbed_models import STRENGTHS, OtherModels, variants

logger = logging.getLogger(__name__)

METRICS: tuple[Metric, ...] = ("filter", "raw")
TRAIN, HELDOUT = "train", "heldout"
IMAGES = {TRAIN: "training images", HELDOUT: "held-out images"}


@dataclass(frozen=True)
class MeasuredModel:
    """The base (without deltas) or a LoRA, and the probe of each image set with captions by its text encoders."""

    name: str
    deltas: Deltas
    probes: Mapping[str, Probe]


@dataclass(frozen=True)
class Curvature:
    """Largest eigenvalues and trace in one metric."""

    eigenvalues: list[Eigenvalue]
    trace: Estimate


@dataclass(frozen=True)
class FlatnessFigures(Landscape):
    """The measurements at the W' of a model, on the training images except where stated.

    losses: by image set.
    worst: loss increase in the steepest direction of W', one for each radius.
    worst_factors: the same for A and B; empty for the base.
    strengths, variants: losses by image set of each.
    """

    losses: dict[str, float]
    worst: list[float]
    worst_factors: list[float]
    curvature: dict[str, Curvature]
    strengths: dict[float, dict[str, float]]
    variants: dict[str, dict[str, float]]


def measure_flatness(
    base: Base,
    objective: Objective,
    base_weights: Weights,
    model: MeasuredModel,
    config: FlatnessConfig,
    others: OtherModels,
) -> FlatnessFigures:
    """Measure `model`; `base_weights` are the weights of the base that any of the models adapts."""
    start = time.monotonic()
    deltas = model.deltas  # empty for the base
    weights = merged(base_weights, deltas)
    losses = {
        kind: loss_on_probe(base.denoiser, objective, probe, config.probe_batch_size)
        for kind, probe in model.probes.items()
    }
    train = losses[TRAIN]
    with eval_mode(base.denoiser):
        figures = FlatnessFigures(
            **vars(landscape(model.name, train, weights, config)),
            losses=_values(losses, weights),
            worst=worst_increases(train, weights, config.radii),
            worst_factors=worst_increases(*loss_of_factors(train, base_weights, deltas), config.radii)
            if deltas
            else [],
            curvature=_curvature(base, train, weights, config),
            strengths={at: _values(losses, merged(base_weights, deltas, at)) for at in STRENGTHS if deltas},
            variants={
                name: _values(losses, changed)
                for name, changed in (variants(base_weights, deltas, others) if deltas else ())
            },
        )
    logger.info("%s: measured in %.0f s", model.name, time.monotonic() - start)
    return figures


def _curvature(base: Base, loss: Loss, weights: Weights, config: FlatnessConfig) -> dict[str, Curvature]:
    if not config.curvature:
        return {}
    with base.twice_differentiable():
        return {
            metric: Curvature(
                top_eigenvalues(loss, weights, metric, config.eigenvalues, config.lanczos_steps, config.seed),
                trace(loss, weights, metric, config.trace_probes, config.seed),
            )
            for metric in METRICS
        }


def _values(losses: Mapping[str, Loss], weights: Weights) -> dict[str, float]:
    return {kind: value(loss, weights) for kind, loss in losses.items()}
