"""The optimizer and learning-rate schedule of a run, with parameter groups by part and factor."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from flatlora_diffusion.config import DENOISERS, ConfigError, OptimConfig, TokenConfig, TrainConfig
from flatlora_diffusion.training.lora_pro import LoraPro

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Parameters with the same learning rate and weight decay, which are trained for the first `share` of the run."""

    parameters: Sequence[nn.Parameter]
    is_text: bool = False
    share: float = 1.0
    lr_factor: float = 1.0


def build_optimizer(
    config: TrainConfig,
    trainable: Mapping[str, nn.Parameter],
    embeddings: Iterable[nn.Parameter],
    processes: int,
    adapted: Iterable[nn.Module] = (),
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Create the optimizer and its learning-rate schedule.

    Args:
        config: settings with the number of steps.
        trainable: all trained parameters by part and name.
        embeddings: those of `trainable` that are new tokens' embeddings.
        processes: the number of processes, for --scale_lr.
        adapted: the models with LoRA layers, for LoRA-Pro.

    Raises ConfigError if the package of the optimizer is not installed.
    """
    optim = config.optim
    assert optim.max_train_steps is not None
    groups = _parameter_groups(trainable, embeddings, config.tokens, optim.lora_plus_ratio)
    per_step = optim.train_batch_size * optim.gradient_accumulation_steps * processes
    optimizer = _make_optimizer(optim, groups, per_step if optim.scale_lr else 1, adapted)
    return optimizer, _make_lr_schedule(optim, optimizer, groups, optim.max_train_steps)


def _parameter_groups(
    trainable: Mapping[str, nn.Parameter],
    embeddings: Iterable[nn.Parameter],
    config: TokenConfig,
    lora_plus_ratio: float | None,
) -> list[Group]:
    """The parameters by denoiser, text encoders and new tokens' embeddings; with `lora_plus_ratio` B apart from A.

    Groups without parameters are left out.
    """
    rows = list(embeddings)
    row_ids = {id(row) for row in rows}
    # PEFT's create_loraplus_optimizer has the same rates, but supports a single model, learning rate, weight decay and
    # length, and treats DoRA's magnitudes of linear layers as B.
    ratio = 1.0 if lora_plus_ratio is None else lora_plus_ratio
    fast = {id(p) for name, p in trainable.items() if lora_plus_ratio is not None and ".lora_B." in name}
    parts = tuple(f"{part}." for part in DENOISERS)
    denoiser = [parameter for name, parameter in trainable.items() if name.startswith(parts)]
    text = [p for name, p in trainable.items() if not name.startswith(parts) and id(p) not in row_ids]
    share = config.train_text_encoder_frac
    groups = [
        Group([p for p in denoiser if id(p) not in fast]),
        Group([p for p in denoiser if id(p) in fast], lr_factor=ratio),
        Group([p for p in text if id(p) not in fast], is_text=True, share=share),
        Group([p for p in text if id(p) in fast], is_text=True, share=share, lr_factor=ratio),
        Group(rows, is_text=True, share=config.train_text_encoder_ti_frac),
    ]
    return [group for group in groups if group.parameters]


def _make_optimizer(
    config: OptimConfig, groups: Sequence[Group], lr_factor: float, adapted: Iterable[nn.Module]
) -> torch.optim.Optimizer:
    """The optimizer, with the learning rate times `lr_factor` of --scale_lr."""
    lr = config.learning_rate * lr_factor
    text_lr = lr if config.optimizer == "prodigy" else config.text_encoder_lr
    sets: list[dict[str, Any]] = [
        {
            "params": list(group.parameters),
            "lr": (text_lr if group.is_text else lr) * group.lr_factor,
            "weight_decay": config.adam_weight_decay_text_encoder if group.is_text else config.adam_weight_decay,
        }
        for group in groups
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    if config.use_8bit_adam:
        adam: Callable[..., torch.optim.Optimizer] = _import("bitsandbytes", "--use_8bit_adam").optim.AdamW8bit
        return adam(sets, lr=lr, betas=betas, eps=config.adam_epsilon)
    if config.optimizer == "prodigy":
        if lr <= 0.1:
            logger.warning("optimizer=prodigy adapts its step size: learning_rate=%g is too low, use about 1", lr)
        prodigy: Callable[..., torch.optim.Optimizer] = _import("prodigyopt", "--optimizer prodigy").Prodigy
        return prodigy(
            sets,
            lr=lr,
            betas=betas,
            beta3=config.prodigy_beta3,
            eps=config.adam_epsilon,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        factored: torch.optim.Optimizer = Adafactor(sets, lr=lr, scale_parameter=False, relative_step=False)
        return factored
    if config.optimizer == "lora-pro":
        return LoraPro(sets, adapted, lr=lr, betas=betas, eps=config.adam_epsilon)
    # With fp16's scaler the fused kernel would skip steps itself, and `step_was_skipped` would not report them.
    fused = None if config.mixed_precision == "fp16" else True
    return torch.optim.AdamW(sets, lr=lr, betas=betas, eps=config.adam_epsilon, fused=fused)


def _make_lr_schedule(
    config: OptimConfig, optimizer: torch.optim.Optimizer, groups: Sequence[Group], total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule; a group's rate is 0 after its share of `total_steps`."""
    if config.lr_scheduler != "constant" and config.lr_warmup_steps >= total_steps:
        logger.warning(
            "lr_warmup_steps=%d is not below the %d steps of the run: the learning rate reaches only %.0f %% of its "
            "value; give fewer warm-up steps",
            config.lr_warmup_steps,
            total_steps,
            100 * (total_steps - 1) / config.lr_warmup_steps,
        )
    schedule: torch.optim.lr_scheduler.LambdaLR = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    for index, group in enumerate(groups):
        schedule.lr_lambdas[index] = _zero_after(schedule.lr_lambdas[index], group.share * total_steps)
    set_lr(schedule)
    return schedule


def set_lr(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the optimizer's learning rates to those of the schedule's present step."""
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _zero_after(factor: Callable[[int], float], end: float) -> Callable[[int], float]:
    return lambda step: factor(step) if step < end else 0.0


def _import(package: str, setting: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{setting} needs the package {package}: pip install {package}")
    return importlib.import_module(package)
