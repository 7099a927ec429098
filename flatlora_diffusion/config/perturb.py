"""The training method and its settings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.methods import (
    DEFAULT_SIGMA,
    Method,
    default_of,
    methods_with,
    settings_not_of,
)
from flatlora_diffusion.config.setting import ConfigError, Section, setting

SigmaSchedule = Literal["cosine", "constant", "down"]
NoiseKind = Literal["filter", "iid"]
DrawKind = Literal["full", "low_rank"]
PerturbPer = Literal["microbatch", "step"]


def cleared_by(names: Collection[str]) -> dict[str, None]:
    """Return the settings of a preset or file to reset when the flags `names` are given: --rho_rise resets rho."""
    return {"rho": None} if "rho_rise" in names and "rho" not in names else {}


def check_unused_flags(config: PerturbConfig, given: Collection[str]) -> None:
    """Raise ConfigError if the method or schedule does not use a flag.

    Args:
        config: the settings with all flags.
        given: names of the flags; settings of presets and files may be meant for other methods.
    """
    names = {name for name in given if getattr(config, name, None) is not None}
    for name in sorted(names):
        if config.method not in methods_with(name):
            raise ConfigError(_unused(config, name))
    if {"sigma_schedule", "sigma_ramp_steps"} <= names and config.sigma_schedule == "constant":
        raise ConfigError(
            f"--sigma_schedule constant has no ramp, but sigma_ramp_steps={config.sigma_ramp_steps} was given; remove "
            "one of them"
        )


def _unused(config: PerturbConfig, name: str) -> str:
    value = getattr(config, name)
    text = f"{value:g}" if isinstance(value, float) else value
    return (
        f"--method {config.method} has no {name}, but {name}={text} was given; remove --{name} or use "
        f"--method {' or '.join(methods_with(name))}"
    )


@dataclass(frozen=True)
class PerturbConfig(Section):
    """The method and the settings of its perturbation."""

    method: Method = setting(
        "flat-lora",
        "training method",
        is_shared=True,
    )
    sigma: float | None = setting(
        None,
        f"flat-lora: noise strength, relative to the norm of each filter; default {DEFAULT_SIGMA}; in the paper 0.05 "
        "for language models, 0.15 for CLIP, 0.1 for SDXL",
        min=0,
    )
    sigma_schedule: SigmaSchedule = setting(
        "cosine",
        "schedule of sigma: cosine (0 to sigma), constant, or down (sigma to 0 by a cosine); the paper does not "
        "specify it for SDXL",
    )
    sigma_ramp_steps: int | None = setting(
        None,
        "steps until the end of the sigma schedule; default: all steps, for an extended run those of the finished run",
        min=1,
    )
    rho: float | None = setting(
        None,
        "lora-sam, sam, bi-lora: perturbation radius, a Frobenius norm over all adapted layers; of A and B for "
        f"lora-sam (default {default_of('rho', 'lora-sam')}), of W for sam (default: by --rho_rise), of the product "
        f"of the second LoRA for bi-lora (default {default_of('rho', 'bi-lora')})",
        min=0,
        legacy_default=None,
    )
    rho_rise: float | None = setting(
        None,
        "sam without --rho: calibrate rho before training so that the perturbation increases the loss by this "
        f"fraction; default {default_of('rho_rise', 'sam')}",
        min=0.0001,
        max=10,
        legacy_default=None,
    )
    bar_strength: float | None = setting(
        None,
        "nbar: strength of the rescaling of A and B relative to the learning rate, with cosine decay; default "
        f"{default_of('bar_strength', 'nbar')}",
        min=0,
        legacy_default=None,
    )
    perturb_seed: int | None = setting(None, "flat-lora: seed of the noise; default: --seed", min=0, max=2**63 - 1)
    perturb_noise: NoiseKind = setting(
        "filter",
        "flat-lora: filter (noise scaled by the norm of each filter, Eq. 7) or iid (the same std in a whole layer)",
    )
    perturb_draw: DrawKind = setting(
        "low_rank",
        "flat-lora: low_rank (fast; mean and covariance of Eq. 7) or full (every entry sampled independently, exactly "
        "Eq. 7)",
        legacy_default="full",
    )
    perturb_norm_every: int = setting(
        10,
        "flat-lora: compute the filter norms every N optimizer steps; 1 in the paper",
        min=1,
        legacy_default=1,
    )
    perturb_per: PerturbPer = setting(
        "microbatch", "flat-lora: new noise per micro-batch, or per optimizer step as in the paper"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in settings_not_of(self.method):
            if getattr(self, name) is not None:
                raise ConfigError(_unused(self, name))

    @property
    def draws_noise(self) -> bool:
        """Whether the method adds noise to W."""
        return default_of("sigma", self.method) is not None

    @property
    def effective_sigma(self) -> float:
        """The sigma in use; 0 for methods without noise."""
        return self._effective("sigma")

    @property
    def target_loss_increase(self) -> float:
        """Relative loss increase for the calibration of rho; 0 if rho is not calibrated."""
        return self._effective("rho_rise") if self.rho is None else 0.0

    @property
    def effective_rho(self) -> float:
        """The rho in use, 0 for methods without it; for SAM the default of earlier versions until it is calibrated."""
        return self._effective("rho")

    @property
    def effective_bar_strength(self) -> float:
        """The bar_strength in use; 0 for methods without it."""
        return self._effective("bar_strength")

    def _effective(self, name: str) -> float:
        value: float | None = getattr(self, name)
        return value if value is not None else default_of(name, self.method) or 0.0
