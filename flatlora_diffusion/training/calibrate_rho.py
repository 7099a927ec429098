"""The sigma or rho at which eps makes the loss rise as much as was asked for, found before a run's first step.

What one base hardly feels can break another, so that neither carries over; the rise of the loss says what they do, to
any base. For small random eps it grows with sigma^2 (the second order of E[L(W' + eps)]), so few trials find sigma,
all with the same images, noise, timesteps and eps. An ascent of length rho makes it rise by rho ||g|| to first order,
so rho is read off the gradients g of the first steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from flatlora_diffusion.adapter.setup import adapted_models
from flatlora_diffusion.config import RunError
from flatlora_diffusion.method.rivals.sketch import Sketches
from flatlora_diffusion.method.rivals.weight_gradients import SlopeReader
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.training.loss_scale import loss_scale, taken_finite
from flatlora_diffusion.training.micro_batches import DrawnMicroBatch, first_micro_batches, micro_batches
from flatlora_diffusion.training.state import TrainState, dropout_draws

logger = logging.getLogger(__name__)

SAMPLES = 64  # images, those of several passes over a small set counted each time
SLOPES = 16  # images whose gradients say enough of rho (`rho_rise` in the tag studies)
MOST = 4.0  # four times the filters themselves: what is left of them then says nothing
_TRIALS, _NEAR, _FASTEST = 10, 1.1, 4.0


def start_at_rise(state: TrainState) -> None:
    """Settle sigma or rho so that the mean loss of the first images rises by what was asked for.

    Raises RunError when none does.
    """
    rising = state.config.perturb.rising
    found = _rho(state) if rising == "rho" else _sigma(state)
    state.gradient.detach()
    state.config = state.batches.config = state.config.replace(**{rising: found})
    state.begin_gradient()


def _rho(state: TrainState) -> float:
    """rho = rise * E[L] / E[||g||], each g the mean gradient in W of one step, as SAM ascends along it.

    Steps whose gradients are finite at no scale of fp16 are left out.
    """
    wanted = state.config.perturb.rise
    state.gradient.detach()
    reader = SlopeReader(adapted_models(state.sdxl.pipeline, state.config.adapter).values())
    try:
        found = [
            taken_finite(state.accelerator, partial(_loss_and_slope, state, reader, step), _is_finite)
            for step in range(_steps(state, SLOPES))
        ]
    finally:
        reader.detach()
    losses, slopes = (math.fsum(one[place] for one in found if _is_finite(one)) for place in range(2))
    if slopes == 0:
        raise RunError(
            f"rho_rise={wanted:g} was asked for, but no first gradient is finite and above 0; give the --rho"
        )
    rho = float(f"{wanted * losses / slopes:.3g}")
    logger.info("rho %.3g makes the loss rise by %.3g %% to first order", rho, 100 * wanted)
    return rho


def _loss_and_slope(state: TrainState, reader: SlopeReader, step: int) -> tuple[float, float]:
    """The mean loss of a step's images, of all processes, and ||dL/dW||, as sketched by SAM."""
    with reader.reading(Sketches(state.batches.seed, step)) as slopes:
        losses = [one.backward(is_shared=False) for one in micro_batches(state, step, DrawHash())]
    state.optimizer.zero_grad(set_to_none=True)
    slopes.average()
    loss = state.accelerator.reduce(torch.stack(losses).mean(), "mean")
    return float(loss), float(slopes.norm()) / loss_scale(state.accelerator)


def _is_finite(loss_and_slope: tuple[float, float]) -> bool:
    return math.isfinite(loss_and_slope[1])


def _sigma(state: TrainState) -> float:
    wanted = state.config.perturb.rise
    drawn = list(first_micro_batches(state, _steps(state, SAMPLES)))
    clean = _loss(state, drawn, 0.0)

    def rise(sigma: float) -> float:
        found = _loss(state, drawn, sigma) / clean - 1
        logger.info("sigma %.3g makes the loss rise by %.2f %%", sigma, 100 * found)
        return found if math.isfinite(found) else math.inf

    sigma = sigma_at_rise(rise, wanted, state.config.perturb.strength)
    if sigma is None:
        raise RunError(
            f"sigma_rise={wanted:g} was asked for, but no sigma up to {MOST:g} makes the loss rise by that; give a "
            "smaller --sigma_rise or the --sigma itself"
        )
    return sigma


def sigma_at_rise(rise: Callable[[float], float], wanted: float, first: float) -> float | None:
    """The sigma, of three digits, at which `rise` is about `wanted`, looked for from `first` on; None for none."""
    sigma = first
    for _ in range(_TRIALS):
        found = rise(sigma)
        if wanted / _NEAR <= found <= wanted * _NEAR:
            return float(f"{sigma:.3g}")
        factor = math.sqrt(wanted / found) if found > 0 else _FASTEST
        sigma *= min(max(factor, 1 / _FASTEST), _FASTEST)
        if sigma > MOST:
            return None
    return None


@torch.no_grad()
def _loss(state: TrainState, drawn: Sequence[DrawnMicroBatch], sigma: float) -> float:
    """The mean over the micro-batches of all processes, each with the eps of its own."""
    is_one = state.config.perturb.perturb_per == "step"
    losses = []
    for one in drawn:
        with ExitStack() as stack:
            stack.enter_context(dropout_draws(state, one.step, one.slot))
            for flat in state.flats if sigma > 0 else ():
                stack.enter_context(flat.perturb(one.step, 0 if is_one else one.slot, sigma))
            losses.append(one.loss().detach())
    return float(state.accelerator.reduce(torch.stack(losses).mean(), "mean"))


def _steps(state: TrainState, samples: int) -> int:
    """How many have so many images."""
    optim = state.config.optim
    images = optim.train_batch_size * optim.gradient_accumulation_steps * state.accelerator.num_processes
    return min(-(-samples // images), state.total_steps)
