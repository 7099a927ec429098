"""What a new run reads off the first steps that it will take: first weights, and sigma or rho by a rise."""

from __future__ import annotations

from flatlora_diffusion.adapter.anchor import start_at_slopes
from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.trained_parts import adapted_models
from flatlora_diffusion.config import RunError
from flatlora_diffusion.method.rivals.slopes import read_slopes
from flatlora_diffusion.training.beginning.rise import start_at_rise
from flatlora_diffusion.training.micro_batches import first_micro_batches
from flatlora_diffusion.training.state import TrainState


def first_weights(state: TrainState) -> None:
    """Give a new run's LoRA the first weights that need gradients, all others have theirs, and what a rise finds."""
    if state.config.adapter.adapter == "lora-ga":
        _start_at_gradients(state, min(state.config.adapter.slope_steps, state.total_steps))
    if state.config.perturb.rise > 0:
        start_at_rise(state)


def _start_at_gradients(state: TrainState, steps: int) -> None:
    """Let LoRA-GA start where the mean gradient of so many steps points."""
    config, adapted = state.config, adapted_models(state.sdxl.pipeline, state.config.adapter)
    state.gradient.detach()
    found = read_slopes(adapted.values(), first_micro_batches(state, steps))
    state.optimizer.zero_grad(set_to_none=True)
    if not all(bool(slope.isfinite().all()) for slope in found):
        raise RunError(
            "the gradients that --adapter lora-ga starts from are not finite; use --mixed_precision bf16 or another "
            "adapter"
        )
    slopes = iter(found)
    scaler = state.accelerator.scaler
    share = 1 / (steps * (1.0 if scaler is None else float(scaler.get_scale())))
    seed = state.batches.seed if config.adapter.lora_init_seed is None else config.adapter.lora_init_seed
    for model in adapted.values():
        start_at_slopes(model, {name: next(slopes) * share for name in lora_layers(model)}, seed)
    state.begin_gradient()
    if state.ema is not None:
        state.ema.shadow_params = [parameter.detach().clone() for parameter in state.trainable.values()]
