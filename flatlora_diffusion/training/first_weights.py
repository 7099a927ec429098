"""What a new run takes from the gradients of its first steps: LoRA-GA's first weights, and rho by --rho_rise."""

from __future__ import annotations

from torch import Tensor

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.setup import adapted_models
from flatlora_diffusion.adapter.svd_start import start_at_slopes
from flatlora_diffusion.config import RunError
from flatlora_diffusion.method.rivals.weight_gradients import read_weight_gradients
from flatlora_diffusion.training.calibrate_rho import calibrate
from flatlora_diffusion.training.loss_scale import loss_scale, scale_put_back, taken_finite
from flatlora_diffusion.training.micro_batches import first_micro_batches
from flatlora_diffusion.training.state import TrainState


def first_weights(state: TrainState) -> None:
    """Start LoRA-GA at the first gradients, and calibrate rho; other adapters have their first weights."""
    with scale_put_back(state.accelerator):
        if state.config.adapter.effective_lora_ga_steps:
            _start_at_gradients(state, min(state.config.adapter.effective_lora_ga_steps, state.total_steps))
        if state.config.perturb.target_loss_increase > 0:
            calibrate(state)


def _start_at_gradients(state: TrainState, steps: int) -> None:
    """Let LoRA-GA start where the mean gradient of so many steps points."""
    config, adapted = state.config, adapted_models(state.sdxl.pipeline, state.config.adapter)
    state.gradient.detach()

    def slopes_of_first_steps() -> list[Tensor]:
        found = read_weight_gradients(adapted.values(), first_micro_batches(state, steps))
        state.optimizer.zero_grad(set_to_none=True)
        return found

    found = taken_finite(state.accelerator, slopes_of_first_steps, _are_finite)
    if not _are_finite(found):
        raise RunError(
            "the gradients that --adapter lora-ga starts from are not finite; use --mixed_precision bf16 or another "
            "adapter"
        )
    slopes = iter(found)
    share = 1 / (steps * loss_scale(state.accelerator))
    seed = state.batches.seed if config.adapter.lora_init_seed is None else config.adapter.lora_init_seed
    for model in adapted.values():
        start_at_slopes(model, {name: next(slopes) * share for name in lora_layers(model)}, seed)
    state.begin_gradient()
    if state.ema is not None:
        state.ema.shadow_params = [parameter.detach().clone() for parameter in state.trainable.values()]


def _are_finite(slopes: list[Tensor]) -> bool:
    return all(bool(slope.isfinite().all()) for slope in slopes)
