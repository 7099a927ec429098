"""The perturbation of models, and how a step's gradient is taken, as a `PerturbConfig` asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from flatlora_diffusion.config import PerturbConfig
from flatlora_diffusion.method.branch import factor_pairs
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.gradient import FactorNoise, MixedGradient, NoisyGradient, StepGradient
from flatlora_diffusion.method.rivals.balance import Balanced
from flatlora_diffusion.method.rivals.bi_lora import BiLora
from flatlora_diffusion.method.rivals.sam import LoraSam, Sam
from flatlora_diffusion.method.settings import scheduled


def step_gradient(
    models: Mapping[str, nn.Module],
    trainable: Mapping[str, nn.Parameter],
    config: PerturbConfig,
    seed: int,
    total_steps: int,
) -> StepGradient:
    """How the gradient of each step is taken over `models`, by the prefix of their draws.

    `trainable` is all that is trained, by name; `total_steps` are the run's, which ramps last if the config says
    nothing else.
    """
    parameters, ramp = list(trainable.values()), config.sigma_ramp_steps or total_steps
    of_factors = {name: one for name, one in trainable.items() if any(f".lora_{side}." in name for side in "ABE")}
    if config.method == "lora-sam":
        return LoraSam(parameters, list(of_factors.values()), config.radius)
    if config.method == "factor-noise":
        strength = partial(scheduled, config.strength, config.sigma_schedule, ramp)
        own = seed if config.perturb_seed is None else config.perturb_seed
        return FactorNoise(of_factors, strength, own, config.perturb_per)
    if config.method == "sam":
        return Sam(models.values(), parameters, config.radius, seed)
    if config.method in ("nbar", "obar"):
        return Balanced(factor_pairs(models.values()), config.balance, config.method == "obar", total_steps)
    flats = flat_loras(models, config, seed, ramp)
    if config.method == "mixed-noise":
        return MixedGradient(flats, config.perturb_per, config.share)
    if flats:
        return NoisyGradient(flats, config.perturb_per)
    return BiLora(models, config.radius, seed) if config.method == "bi-lora" else StepGradient()


def flat_loras(models: Mapping[str, nn.Module], config: PerturbConfig, seed: int, total_steps: int) -> list[FlatLora]:
    """The perturbation of each model's W, by the prefix of its draws; none where nothing draws it.

    `seed` is that of the draws where the config has none of its own.
    """
    if not config.perturbs_weights:
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
            per_example=config.perturb_per == "example",
        )
        for prefix, model in models.items()
    ]
