"""Calibrate SAM's rho before a run's first step, so that its perturbation increases the loss by a given share.

Models differ in how strongly a rho changes their loss; the increase of the loss is comparable. A perturbation of
length rho along the gradient g increases the loss by rho ||g|| to first order, so rho follows from the gradients of
the first steps.
"""

from __future__ import annotations

import logging
import math
from functools import partial

import torch

from flatlora_diffusion.adapter.setup import adapted_models
from flatlora_diffusion.config import RunError
from flatlora_diffusion.method.rivals.sketch import Sketches
from flatlora_diffusion.method.rivals.weight_gradients import WeightGradientHook
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.training.loss_scale import compute_finite, loss_scale
from flatlora_diffusion.training.micro_batches import micro_batches
from flatlora_diffusion.training.state import TrainState

logger = logging.getLogger(__name__)

SAMPLES = 16  # images whose gradients determine rho well enough (see `rho_rise` at the tag `studies`)


def calibrate(state: TrainState) -> None:
    """Set rho so that it increases the loss by the share --rho_rise, and rebuild the gradient computation with it.

    Raises:
        RunError: no gradient of the first steps is finite and above 0.
    """
    state.gradient.detach()
    state.progress.config = state.batches.config = state.config.replace(rho=_rho(state))
    state.rebuild_gradient()


def _rho(state: TrainState) -> float:
    """rho = share * E[L] / E[||g||], where g is the gradient in W that SAM follows: the mean over a step's images.

    Steps whose gradient is not finite at any loss scale are skipped.
    """
    share = state.config.perturb.target_loss_increase
    reader = WeightGradientHook(adapted_models(state.base.pipeline, state.config.adapter).values())
    try:
        measurements = [
            compute_finite(state.accelerator, partial(_loss_and_gradient_norm, state, reader, step), _is_finite)
            for step in range(_steps(state))
        ]
    finally:
        reader.detach()
    finite = [measurement for measurement in measurements if _is_finite(measurement)]
    loss, norm = math.fsum(loss for loss, _ in finite), math.fsum(norm for _, norm in finite)
    if norm == 0:
        raise RunError(f"rho_rise={share:g}: no gradient of the first steps is finite and above 0; give --rho instead")
    rho = float(f"{share * loss / norm:.3g}")
    logger.info("rho %.3g increases the loss by %.3g %% to first order", rho, 100 * share)
    return rho


def _loss_and_gradient_norm(state: TrainState, reader: WeightGradientHook, step: int) -> tuple[float, float]:
    """The mean loss of a step's images over all processes, and ||dL/dW|| by SAM's sketch."""
    with reader.recording(Sketches(state.batches.seed, step)) as slopes:
        losses = [batch.backward(is_shared=False) for batch in micro_batches(state, step, DrawHash())]
    state.optimizer.zero_grad(set_to_none=True)
    slopes.average()
    loss = state.accelerator.reduce(torch.stack(losses).mean(), "mean")
    return float(loss), float(slopes.norm()) / loss_scale(state.accelerator)


def _is_finite(loss_and_norm: tuple[float, float]) -> bool:
    return math.isfinite(loss_and_norm[1])


def _steps(state: TrainState) -> int:
    """The number of steps with SAMPLES images in all."""
    optim = state.config.optim
    images = optim.train_batch_size * optim.gradient_accumulation_steps * state.accelerator.num_processes
    return min(-(-SAMPLES // images), state.total_steps)
