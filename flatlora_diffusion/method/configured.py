"""The perturbation of models as a `PerturbConfig` asks for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from flatlora_diffusion.config import PerturbConfig
from flatlora_diffusion.method.perturbation import FlatLora


def flat_loras(models: Mapping[str, nn.Module], config: PerturbConfig, seed: int, total_steps: int) -> list[FlatLora]:
    """The perturbation of each model, by the prefix of its draws; none for plain LoRA.

    `seed` is that of the draws where the config has none of its own.
    """
    if config.method != "flat-lora":
        return []
    return [
        FlatLora(
            model,
            sigma=config.strength,
            schedule=config.sigma_schedule,
            total_steps=total_steps,
            seed=seed if config.perturb_seed is None else config.perturb_seed,
            noise=config.perturb_noise,
            prefix=prefix,
            draw=config.perturb_draw,
            norm_every=config.perturb_norm_every,
        )
        for prefix, model in models.items()
    ]
