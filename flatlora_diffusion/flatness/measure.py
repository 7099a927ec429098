"""All flatness figures of one W', in the order in which they are measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from flatlora_diffusion.config import FlatnessConfig
from flatlora_diffusion.evaluation.probe import Probe
from flatlora_diffusion.flatness.curvature import Eigenvalue, top_eigenvalues, trace
from flatlora_diffusion.flatness.functional import Estimate, Loss, Metric, Weights, value
from flatlora_diffusion.flatness.landscape import Landscape, landscape, worst_rises
from flatlora_diffusion.flatness.merged_weights import Deltas, in_factors, merged, probe_loss_at, twice_differentiable
from flatlora_diffusion.flatness.perturbed_models import STRENGTHS, OtherModels, variants
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.sampling import eval_mode

logger = logging.getLogger(__name__)

METRICS: tuple[Metric, ...] = ("filter", "raw")
TRAIN, HELDOUT = "train", "heldout"
IMAGES = {TRAIN: "training images", HELDOUT: "held-out images"}


@dataclass(frozen=True)
class MeasuredModel:
    """The base (no deltas) or a LoRA, and the probe of each set of images as its text encoders read the captions."""

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
    """The measurements at the W' of one model. All but losses, strengths and variants is of the training images.

    worst: in W', one for each radius; worst_factors: in A and B, none of the base; strengths and variants: loss by set
    of images.
    """

    losses: dict[str, float]
    worst: list[float]
    worst_factors: list[float]
    curvature: dict[str, Curvature]
    strengths: dict[float, dict[str, float]]
    variants: dict[str, dict[str, float]]


def measure_flatness(
    unet: UNet2DConditionModel,
    objective: Objective,
    base: Weights,
    model: MeasuredModel,
    config: FlatnessConfig,
    others: OtherModels,
) -> FlatnessFigures:
    """The figures of `model`. `base` are the weights of the UNet that any of the models adapts; none is written."""
    start = time.monotonic()
    weights = merged(base, model.deltas)
    losses = {
        kind: probe_loss_at(unet, objective, probe, config.probe_batch_size) for kind, probe in model.probes.items()
    }
    train = losses[TRAIN]
    with eval_mode(unet):
        figures = FlatnessFigures(
            **vars(landscape(model.name, train, weights, config)),
            losses=_values(losses, weights),
            worst=worst_rises(train, weights, config.radii),
            worst_factors=worst_rises(*in_factors(train, base, model.deltas), config.radii) if model.deltas else [],
            curvature=_curvature(unet, train, weights, config),
            strengths=_at_strengths(losses, base, model.deltas),
            variants=_of_variants(losses, base, model.deltas, others),
        )
    logger.info("%s: measured in %.0f s", model.name, time.monotonic() - start)
    return figures


def _at_strengths(losses: Mapping[str, Loss], base: Weights, deltas: Deltas) -> dict[float, dict[str, float]]:
    """The losses by strength; none of the base, which has no LoRA to be weakened."""
    if not deltas:
        return {}
    return {strength: _values(losses, merged(base, deltas, strength)) for strength in STRENGTHS}


def _of_variants(
    losses: Mapping[str, Loss], base: Weights, deltas: Deltas, others: OtherModels
) -> dict[str, dict[str, float]]:
    if not deltas:
        return {}
    return {name: _values(losses, weights) for name, weights in variants(base, deltas, others)}


def _curvature(
    unet: UNet2DConditionModel, loss: Loss, weights: Weights, config: FlatnessConfig
) -> dict[str, Curvature]:
    if not config.curvature:
        return {}
    with twice_differentiable(unet):
        return {
            metric: Curvature(
                top_eigenvalues(loss, weights, metric, config.eigenvalues, config.lanczos_steps, config.seed),
                trace(loss, weights, metric, config.trace_probes, config.seed),
            )
            for metric in METRICS
        }


def _values(losses: Mapping[str, Loss], weights: Weights) -> dict[str, float]:
    return {kind: value(loss, weights) for kind, loss in losses.items()}
