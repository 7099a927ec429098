"""Settings that exclude each other: the check, and the table of methods, adapters and optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatlora_diffusion.config.exclusions import exclusions
from flatlora_diffusion.config.methods import NOISY
from flatlora_diffusion.config.section import ConfigError

if TYPE_CHECKING:
    from flatlora_diffusion.config.training import TrainConfig


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
        *_of_adalora(config),
        *_of_lora_pro(config),
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
            starts_away and adapter.lora_target_modules == "conv",
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
            adapter.is_dora and adapter.lora_dropout > 0 and perturb.method in (*NOISY, "sam", "bi-lora"),
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


def _of_adalora(config: TrainConfig) -> tuple[tuple[object, str], ...]:
    """What does not go with a budget of ranks, and why."""
    adapter = config.adapter
    if adapter.adapter != "adalora":
        return ()
    return (
        (
            adapter.use_dora or adapter.use_rslora,
            "--adapter adalora has factors and a scale of its own, which --use_dora and --use_rslora would replace; "
            "leave them out",
        ),
        (
            adapter.init_lora is not None,
            "--adapter adalora cannot start from the two factors of --init_lora; leave one out",
        ),
        (
            adapter.lora_target_modules == "conv",
            "--adapter adalora adapts linear layers only; give --lora_target_modules all-linear, or another adapter",
        ),
        (
            adapter.lora_block_ranks is not None,
            "--adapter adalora divides the ranks among the layers by itself; leave --lora_block_ranks out",
        ),
        (
            adapter.train_text_encoder,
            "--adapter adalora shares its ranks among the layers of the UNet alone; leave --train_text_encoder out",
        ),
        (
            config.model.quantize_base is not None,
            "--adapter adalora is put around plain linear layers, not those of --quantize_base; leave one out",
        ),
        (
            config.optim.use_ema,
            "--use_ema would average ranks that --adapter adalora has taken with those that it has left; leave one "
            "out",
        ),
        (
            config.perturb.method in ("nbar", "obar"),
            f"--method {config.perturb.method} balances A and B, which --adapter adalora holds at one size; use "
            "another of the two",
        ),
    )


def _of_lora_pro(config: TrainConfig) -> tuple[tuple[object, str], ...]:
    """What LoRA-Pro's fit to the gradient of W does not go with, and why."""
    if config.optim.optimizer != "lora-pro":
        return ()
    method = config.perturb.method
    return (
        (
            config.adapter.adapter == "adalora",
            "--optimizer lora-pro fits two factors, and --adapter adalora has three; leave one out",
        ),
        (
            method in ("lora-sam", "nbar", "obar"),
            f"--optimizer lora-pro needs gradients taken at the A and B that it moves, and --method {method} moves "
            "them in between; use another of the two",
        ),
        (
            config.optim.lora_plus_ratio is not None,
            "--lora_plus_ratio would undo by its faster B what --optimizer lora-pro fits; leave one out",
        ),
    )
