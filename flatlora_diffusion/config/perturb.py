"""How the gradient of a step is taken: the method and its settings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.methods import (
    DEFAULT_SIGMA,
    Method,
    default_of,
    methods_with,
    unused_by,
)
from flatlora_diffusion.config.setting import ConfigError, Section, setting

SigmaSchedule = Literal["cosine", "constant", "down"]
NoiseKind = Literal["filter", "iid"]
DrawKind = Literal["full", "low_rank"]
PerturbPer = Literal["microbatch", "step"]


def overruled_by(given: Collection[str]) -> dict[str, None]:
    """The settings of a preset or file that those `given` leave open: --rho_rise is to find the rho."""
    return {"rho": None} if "rho_rise" in given and "rho" not in given else {}


def refuse_unread(config: PerturbConfig, given: Collection[str]) -> None:
    """Raises ConfigError for a setting among those `given` together that the method or schedule does not read.

    Those of a preset or a file are not given: they may be meant for other methods. None takes a setting back.
    """
    given = {name for name in given if getattr(config, name, None) is not None}
    for name in sorted(given):
        if config.method not in methods_with(name):
            raise ConfigError(_unread(config, name))
    if {"sigma_schedule", "sigma_ramp_steps"} <= given and config.sigma_schedule == "constant":
        raise ConfigError(
            f"--sigma_schedule constant has no ramp, but sigma_ramp_steps={config.sigma_ramp_steps} was given; leave "
            "one out"
        )


def _unread(config: PerturbConfig, name: str) -> str:
    value = getattr(config, name)
    shown = f"{value:g}" if isinstance(value, float) else value
    return (
        f"--method {config.method} has no {name}, but {name}={shown} was given; leave --{name} out or use "
        f"--method {' or '.join(methods_with(name))}"
    )


@dataclass(frozen=True)
class PerturbConfig(Section):
    """How the gradient of a step is taken: at the weights, at W + eps, or where the loss is worst around them."""

    method: Method = setting(
        "flat-lora",
        "where the gradient of a step is taken",
        is_shared=True,
    )
    sigma: float | None = setting(
        None,
        f"relative radius of eps, flat-lora only; default {DEFAULT_SIGMA}; in the paper 0.05 for language, 0.15 for "
        "CLIP, 0.1 for SDXL",
        min=0,
    )
    sigma_schedule: SigmaSchedule = setting(
        "cosine",
        "sigma over the run: up by a cosine, constant, or down to 0 by a cosine; the paper names none for SDXL, a "
        "ramp is our choice",
    )
    sigma_ramp_steps: int | None = setting(
        None,
        "steps after which the ramp has reached its end, to stay there; default: all, or those of the finished run "
        "that is trained longer",
        min=1,
    )
    rho: float | None = setting(
        None,
        "radius of what ascends, a Frobenius norm over all adapted layers: A and B of lora-sam (default "
        f"{default_of('rho', 'lora-sam')}), W of sam (by --rho_rise), the second LoRA's product of bi-lora "
        f"({default_of('rho', 'bi-lora')}, our choice)",
        min=0,
        before=None,
    )
    rho_rise: float | None = setting(
        None,
        "sam only, where --rho is left out: before the first step find the rho by which ascending increases the loss "
        f"by this share, to first order; default {default_of('rho_rise', 'sam')}, best on the tiny base",
        min=0.0001,
        max=10,
        before=None,
    )
    bar_strength: float | None = setting(
        None,
        "nbar only: A and B are rescaled by this times the learning rate, which a cosine lowers over the run; default "
        f"{default_of('bar_strength', 'nbar')}",
        min=0,
        before=None,
    )
    perturb_seed: int | None = setting(None, "seed of eps alone; default: --seed", min=0, max=2**63 - 1)
    perturb_noise: NoiseKind = setting(
        "filter", "eps scaled to each filter as in Eq. 7, or iid: the same energy spread evenly over a layer"
    )
    perturb_draw: DrawKind = setting(
        "low_rank",
        "eps as a product of two thin matrices, with the variances of Eq. 7 and no correlations either, from far "
        "fewer numbers and in less time; full: each entry drawn by itself, the letter of Eq. 7",
        before="full",
    )
    perturb_norm_every: int = setting(
        10, "optimizer steps between two measurements of the norms that scale eps; 1 in the paper", min=1, before=1
    )
    perturb_per: PerturbPer = setting(
        "microbatch", "a new eps for each micro-batch, or one for each optimizer step as in the paper"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in unused_by(self.method):
            if getattr(self, name) is not None:
                raise ConfigError(_unread(self, name))

    @property
    def draws_noise(self) -> bool:
        """Whether the method trains at W + eps."""
        return default_of("sigma", self.method) is not None

    @property
    def strength(self) -> float:
        """The sigma in force: 0 where no eps is drawn."""
        return self._in_force("sigma")

    @property
    def loss_increase(self) -> float:
        """The share by which --rho_rise is to increase the loss; 0 where rho needs no calibration."""
        return self._in_force("rho_rise") if self.rho is None else 0.0

    @property
    def radius(self) -> float:
        """The rho in force, 0 where nothing ascends; of SAM that of runs before --rho_rise until it is calibrated."""
        return self._in_force("rho")

    @property
    def balance(self) -> float:
        """The bar_strength in force."""
        return self._in_force("bar_strength")

    def _in_force(self, name: str) -> float:
        given: float | None = getattr(self, name)
        return given if given is not None else default_of(name, self.method) or 0.0
