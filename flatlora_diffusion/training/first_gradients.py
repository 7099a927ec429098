"""Start a new run from the gradients of its first steps: LoRA-GA's first weights, and rho for --rho_rise.

Models differ in how strongly a rho changes their loss; the increase of the loss is comparable. A perturbation of
length rho along the gradient g increases the loss by rho ||g|| to first order, so rho follows from the gradients of
the first steps.
"""

from __future__ import annotations

import logging
import math
from functools import partial

import torch
from torch import Tensor

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.setup import adapted_models
from flatlora_diffusion.adapter.svd_start import start_at_gradients
from flatlora_diffusion.config import RunError
from flatlora_diffusion.method.rivals.sketch import Sketches
from flatlora_diffusion.method.rivals.weight_gradients import WeightGradientHook, read_weight_gradients
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.training.loss_scale import compute_finite, loss_scale, loss_scale_restored
from flatlora_diffusion.training.micro_batches import micro_batches
from flatlora_diffusion.training.state import TrainState

logger = logging.getLogger(__name__)

SAMPLES = 16  # images whose gradients determine rho well enough (see `rho_rise` at the tag `studies`)


def start_from_gradients(state: TrainState) -> None:
    """Initialize LoRA-GA and calibrate rho where the settings ask for it; otherwise do nothing."""
    with loss_scale_restored(state.accelerator):
        if state.config.adapter.effective_lora_ga_steps:
            _initialize_lora_ga(state, min(state.config.adapter.effective_lora_ga_steps, state.total_steps))
        if state.config.perturb.target_loss_increase > 0:
            calibrate(state)


def _initialize_lora_ga(state: TrainState, steps: int) -> None:
    config, adapted = state.config, adapted_models(state.base.pipeline, state.config.adapter)
    state.gradient.detach()

    def weight_gradients() -> list[Tensor]:
        batches = (batch for step in range(steps) for batch in micro_batches(state, step, DrawHash()))
        gradients = read_weight_gradients(adapted.values(), batches)
        state.optimizer.zero_grad(set_to_none=True)
        return gradients

    gradients = compute_finite(state.accelerator, weight_gradients, _are_finite)
    if not _are_finite(gradients):
        raise RunError(
            "adapter=lora-ga: the gradients of the first steps are not finite; use --mixed_precision bf16 or another "
            "--adapter"
        )
    by_layer = iter(gradients)
    factor = 1 / (steps * loss_scale(state.accelerator))
    seed = state.batches.seed if config.adapter.lora_init_seed is None else config.adapter.lora_init_seed
    for model in adapted.values():
        start_at_gradients(model, {name: next(by_layer) * factor for name in lora_layers(model)}, seed)
    state.rebuild_gradient()
    if state.ema is not None:
        state.ema.shadow_params = [parameter.detach().clone() for parameter in state.trainable.values()]


def _are_finite(tensors: list[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def calibrate(state: TrainState) -> None:
    """Set rho so that it increases the loss by the share --rho_rise, and rebuild the gradient computation with it.

    Raises RunError if no gradient of the first steps is finite and above 0.
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
