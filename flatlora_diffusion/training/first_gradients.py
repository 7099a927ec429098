"""Start a new run from the gradients of its first steps: LoRA-GA's first weights, and rho for --rho_rise."""

from __future__ import annotations

from torch import Tensor

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.setup import adapted_models
from flatlora_diffusion.adapter.svd_start import start_at_gradients
from flatlora_diffusion.config import RunError
from flatlora_diffusion.method.rivals.weight_gradients import read_weight_gradients
from flatlora_diffusion.training.calibrate_rho import calibrate
from flatlora_diffusion.training.loss_scale import compute_finite, loss_scale, loss_scale_restored
from flatlora_diffusion.training.micro_batches import first_micro_batches
from flatlora_diffusion.training.state import TrainState


def start_from_gradients(state: TrainState) -> None:
    """Initialize LoRA-GA and calibrate rho where the settings ask for it; otherwise do nothing."""
    with loss_scale_restored(state.accelerator):
        if state.config.adapter.effective_lora_ga_steps:
            _initialize_lora_ga(state, min(state.config.adapter.effective_lora_ga_steps, state.total_steps))
        if state.config.perturb.target_loss_increase > 0:
            calibrate(state)


def _initialize_lora_ga(state: TrainState, steps: int) -> None:
    """Initialize LoRA-GA from the mean gradient of the first `steps`."""
    config, adapted = state.config, adapted_models(state.base.pipeline, state.config.adapter)
    state.gradient.detach()

    def weight_gradients() -> list[Tensor]:
        gradients = read_weight_gradients(adapted.values(), first_micro_batches(state, steps))
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
