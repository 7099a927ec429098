"""Settings that exclude each other: the check, and the table of methods, adapters and optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatlora_diffusion.config.exclusions import exclusions
from flatlora_diffusion.config.setting import ConfigError

if TYPE_CHECKING:
    from flatlora_diffusion.config.train import TrainConfig

LINEAR_ONLY = ("pissa", "lora-ga", "adalora", "full")
"""Adapters that convolutions cannot have."""


def check_combinations(config: TrainConfig) -> None:
    """Raises ConfigError, in a sentence that names both, for the first settings that exclude each other."""
    for is_refused, why in (*exclusions(config), *_of_rivals(config)):
        if is_refused:
            raise ConfigError(why)


def _of_rivals(config: TrainConfig) -> tuple[tuple[object, str], ...]:
    """What methods, adapters and optimizers do not go together, and why."""
    adapter, perturb, optim = config.adapter, config.perturb, config.optim
    name = adapter.adapter
    starts_away = name in ("pissa", "lora-ga")
    return (
        *_of_unet_alone(config),
        *_of_lora_pro(config),
        (
            adapter.is_dora and optim.delta_weight_decay > 0,
            "--delta_weight_decay holds down W' - W of two factors, and DoRA rescales it; leave one out",
        ),
        (
            optim.use_8bit_adam and optim.optimizer != "adamw",
            f"--use_8bit_adam is for --optimizer adamw, not {optim.optimizer}; leave one out",
        ),
        (
            starts_away and adapter.use_dora,
            f"--adapter {name} starts away from W, which --use_dora would rescale; leave one out",
        ),
        (
            starts_away and adapter.init_lora is not None,
            f"--adapter {name} has a start of its own, and --init_lora another one; leave one out",
        ),
        (
            name in LINEAR_ONLY and adapter.lora_target_modules == "conv",
            f"--adapter {name} adapts linear layers only; give --lora_target_modules all-linear, or another adapter",
        ),
        (
            name != "pissa" and adapter.pissa_iterations is not None,
            f"--pissa_iterations means nothing for --adapter {name}; leave it out, or use --adapter pissa",
        ),
        (
            name != "lora-ga" and adapter.lora_ga_steps is not None,
            f"--lora_ga_steps means nothing for --adapter {name}; leave it out, or use --adapter lora-ga",
        ),
        (
            adapter.is_dora
            and adapter.lora_dropout > 0
            and perturb.method in ("flat-lora", "mixed-noise", "sam", "bi-lora"),
            f"--lora_dropout with DoRA lets what --method {perturb.method} adds to W escape the rescaling; set "
            "--lora_dropout 0",
        ),
        (
            config.objective.prior_from_base and (starts_away or perturb.method not in ("lora", "flat-lora")),
            "--prior_from_base is for --method lora and flat-lora with an --adapter that starts at the base, not for "
            f"{perturb.method} with {name}; leave it out",
        ),
        (
            optim.lora_plus_ratio is not None and optim.optimizer == "prodigy",
            "--lora_plus_ratio needs learning rates of its own, and --optimizer prodigy finds one for all; leave one "
            "out",
        ),
    )


def _of_unet_alone(config: TrainConfig) -> tuple[tuple[object, str], ...]:
    """What does not go with adapters that are no LoRA of two trained factors, and why."""
    adapter, name, method = config.adapter, config.adapter.adapter, config.perturb.method
    if name not in ("adalora", "full"):
        return ()
    is_full, out = name == "full", "leave one out"
    return (
        (adapter.use_dora or adapter.use_rslora, f"--adapter {name} is itself, not --use_dora or --use_rslora; {out}"),
        (adapter.init_lora is not None, f"--adapter {name} cannot start from the two factors of --init_lora; {out}"),
        (
            adapter.lora_block_ranks is not None,
            f"--adapter {name} has one --rank for all layers, and --lora_block_ranks one for each; {out}",
        ),
        (adapter.train_text_encoder, f"--adapter {name} is for the UNet alone; leave --train_text_encoder out"),
        (
            config.model.quantize_base is not None,
            f"--adapter {name} is put around plain linear layers, not those of --quantize_base; {out}",
        ),
        (
            not is_full and config.optim.use_ema,
            f"--use_ema would average ranks that --adapter {name} has taken with those that it has left; {out}",
        ),
        (
            method in ("nbar", "obar") or (is_full and method in ("lora-sam", "bi-lora", "factor-noise")),
            f"--method {method} is made for A and B of a LoRA, which --adapter {name} does not have; use another of "
            "the two",
        ),
        (
            config.optim.optimizer == "lora-pro",
            f"--optimizer lora-pro is made for A and B of a LoRA, which --adapter {name} does not have; {out}",
        ),
        (
            is_full and (adapter.lora_alpha is not None or adapter.lora_dropout > 0),
            f"--adapter {name} has neither the scale of --lora_alpha nor the A of --lora_dropout; leave them out",
        ),
        (
            is_full and config.optim.lora_plus_ratio is not None,
            f"--lora_plus_ratio is made for A and B of a LoRA, which --adapter {name} does not have; {out}",
        ),
    )


def _of_lora_pro(config: TrainConfig) -> tuple[tuple[object, str], ...]:
    """What LoRA-Pro's fit to the gradient of W does not go with, and why."""
    if config.optim.optimizer != "lora-pro":
        return ()
    method = config.perturb.method
    return (
        (
            method in ("lora-sam", "factor-noise", "nbar", "obar"),
            f"--optimizer lora-pro needs gradients taken at the A and B that it moves, and --method {method} moves "
            "them in between; use another of the two",
        ),
        (
            config.optim.lora_plus_ratio is not None,
            "--lora_plus_ratio would undo by its faster B what --optimizer lora-pro fits; leave one out",
        ),
    )
