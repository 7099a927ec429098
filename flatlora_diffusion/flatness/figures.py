"""All flatness figures of one W': what is measured, in which order, from which draws."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from flatlora_diffusion.config import FlatnessConfig, NoiseKind
from flatlora_diffusion.evaluation.probe import Probe
from flatlora_diffusion.flatness.curvature import Eigenvalue, top_eigenvalues, trace
from flatlora_diffusion.flatness.landscape import expected_rise, worst_rises
from flatlora_diffusion.flatness.merged_weights import Deltas, merged, probe_loss_at, twice_differentiable
from flatlora_diffusion.flatness.robustness import STRENGTHS, Company, variants
from flatlora_diffusion.flatness.surface import axis, loss_slice, loss_surface
from flatlora_diffusion.flatness.weight_space import Estimate, Loss, Metric, Weights, value
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.sampling import evaluating

logger = logging.getLogger(__name__)

NOISES: tuple[NoiseKind, ...] = ("filter", "iid")
METRICS: tuple[Metric, ...] = ("filter", "raw")
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True)
class Arm:
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
class Figures:
    """What was measured at the W' of one arm. All but losses, strengths and variants is of the training images.

    rises: by kind of noise, one for each sigma; worst: one for each radius; slices: (direction, point); surface:
    (point along direction 1, point along direction 0); strengths and variants: loss by set of images.
    """

    name: str
    losses: dict[str, float]
    rises: dict[str, list[Estimate]]
    worst: list[float]
    curvature: dict[str, Curvature]
    slices: list[list[float]]
    surface: list[list[float]]
    strengths: dict[float, dict[str, float]]
    variants: dict[str, dict[str, float]]


def measure(
    unet: UNet2DConditionModel,
    objective: Objective,
    base: Weights,
    arm: Arm,
    config: FlatnessConfig,
    company: Company,
) -> Figures:
    """The figures of `arm`. `base` are the weights of the UNet that any of the arms adapts; none is written."""
    start = time.monotonic()
    weights = merged(base, arm.deltas)
    losses = {
        kind: probe_loss_at(unet, objective, probe, config.probe_batch_size) for kind, probe in arm.probes.items()
    }
    train, at, draws, seed = losses[TRAIN], axis(config.extent, config.surface_points), config.rise_draws, config.seed
    with evaluating(unet):
        figures = Figures(
            arm.name,
            _each(losses, weights),
            {
                kind: [expected_rise(train, weights, sigma, draws, seed, kind) for sigma in config.sigmas]
                for kind in NOISES
            },
            worst_rises(train, weights, config.radii),
            _curvature(unet, train, weights, config),
            [loss_slice(train, weights, at, seed, index) for index in range(config.slice_directions)],
            loss_surface(train, weights, at, seed),
            {s: _each(losses, merged(base, arm.deltas, s)) for s in STRENGTHS} if arm.deltas else {},
            {name: _each(losses, changed) for name, changed in variants(base, arm.deltas, company)}
            if arm.deltas
            else {},
        )
    logger.info("%s: measured in %.0f s", arm.name, time.monotonic() - start)
    return figures


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


def _each(losses: Mapping[str, Loss], weights: Weights) -> dict[str, float]:
    return {kind: value(loss, weights) for kind, loss in losses.items()}
