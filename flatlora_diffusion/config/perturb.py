"""How the gradient of a step is taken: the methods, and the settings of each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import ConfigError, Section, setting

Method = Literal["lora", "flat-lora", "mixed-noise", "factor-noise", "lora-sam", "sam", "bi-lora", "nbar", "obar"]
SigmaSchedule = Literal["cosine", "linear", "constant", "down"]
NoiseKind = Literal["filter", "iid"]
DrawKind = Literal["full", "philox", "low_rank"]
PerturbPer = Literal["microbatch", "step", "example"]

METHOD_NAMES: dict[str, str] = {
    "lora": "LoRA",
    "flat-lora": "Flat-LoRA",
    "mixed-noise": "Mixed noise",
    "factor-noise": "Noise in A and B",
    "lora-sam": "LoRA-SAM",
    "sam": "SAM",
    "bi-lora": "Bi-LoRA",
    "nbar": "nBAR",
    "obar": "oBAR",
}
"""Each method as people read it."""
DEFAULT_SIGMA = 0.1
IN_FORCE: dict[str, dict[str, float]] = {
    "sigma": dict.fromkeys(("flat-lora", "mixed-noise", "factor-noise"), DEFAULT_SIGMA),
    "sigma_rise": dict.fromkeys(("flat-lora", "mixed-noise"), 0.0),
    "rho": {"lora-sam": 0.003, "sam": 0.05, "bi-lora": 0.05},
    "rho_rise": {"sam": 0.25},
    "noise_share": {"mixed-noise": 0.5},
    "bar_strength": {"nbar": 0.25, "obar": 0.25},
}
"""Settings that some methods have and others refuse: what is in force where they are left open, by method."""
OF_METHODS = tuple(IN_FORCE)
"""Settings that tell the methods apart, so that they belong to an arm of a comparison."""
NOISY = tuple(IN_FORCE["sigma"])
PERTURBING = ("flat-lora", "mixed-noise")
"""Those that draw eps of W, not of A and B."""
METHODS_WITH: dict[str, Collection[str]] = {
    **IN_FORCE,
    **dict.fromkeys(("sigma_schedule", "sigma_ramp_steps", "perturb_seed", "perturb_per"), NOISY),
    **dict.fromkeys(("perturb_noise", "perturb_draw", "perturb_norm_every"), PERTURBING),
}
"""The methods that a setting means something for, where that is not all."""


def unused_by(method: str) -> tuple[str, ...]:
    """The settings of other methods, which must be left open for this one."""
    return tuple(name for name, values in IN_FORCE.items() if method not in values)


def by_method(method: str) -> dict[str, str | None]:
    """The settings that turn others into this method's: its name, and what only others have left open."""
    return {"method": method, **dict.fromkeys(unused_by(method))}


def overruled_by(given: Collection[str]) -> dict[str, None]:
    """What settings that are given leave open of those that a preset or file has: a rise is to find the sigma."""
    return {name: None for name in ("sigma", "rho") if f"{name}_rise" in given and name not in given}


def refuse_unread(config: PerturbConfig, given: Collection[str]) -> None:
    """Raises ConfigError for a setting among those `given` together that the method or schedule does not read.

    Those of a preset or a file are not given: they may be meant for other methods. None takes a setting back.
    """
    given = {name for name in given if getattr(config, name, None) is not None}
    for name in sorted(given):
        if config.method not in METHODS_WITH.get(name, METHOD_NAMES):
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
        f"--method {' or '.join(METHODS_WITH[name])}"
    )


@dataclass(frozen=True)
class PerturbConfig(Section):
    """How the gradient of a step is taken: at the weights, at W + eps, or where the loss is worst around them."""

    method: Method = setting(
        "flat-lora",
        "flat-lora trains at W + eps (arXiv:2409.14396), mixed-noise there and at W too (two passes), lora at W "
        "alone, factor-noise at A + eps and B + eps; lora-sam and sam (two passes) where A and B, or W, have ascended "
        "by --rho (arXiv:2010.01412); bi-lora beside a second LoRA that ascends and is dropped at the end "
        "(arXiv:2508.19564); nbar and obar balance A and B by their gradients or by themselves (arXiv:2410.14802)",
        is_shared=True,
    )
    sigma: float | None = setting(
        None,
        f"relative radius of eps, flat-lora, mixed-noise and factor-noise only; default {DEFAULT_SIGMA}; in the "
        "paper 0.05 for language, 0.15 for CLIP, 0.1 for SDXL",
        min=0,
    )
    sigma_rise: float | None = setting(
        None,
        "flat-lora and mixed-noise only, where --sigma is left out: before the first step find the sigma at which eps "
        "makes the loss rise by this share, so that one setting fits any base; default: look for none",
        min=0.0001,
        max=1,
        before=None,
    )
    sigma_schedule: SigmaSchedule = setting(
        "cosine",
        "how sigma moves over the run: up to it by a cosine or on a line, constant, or down from it to 0 by a cosine; "
        "the paper names none for SDXL, a ramp is our choice",
    )
    sigma_ramp_steps: int | None = setting(
        None,
        "steps in which the ramp reaches its end, to stay there; default: all, or those of the finished run that is "
        "trained longer",
        min=1,
    )
    noise_share: float | None = setting(
        None,
        "mixed-noise only: share of the gradient that is taken at W + eps, the rest at W; default "
        f"{IN_FORCE['noise_share']['mixed-noise']} "
        "(arXiv:2404.00357)",
        min=0,
        max=1,
        before=None,
    )
    rho: float | None = setting(
        None,
        "radius of what ascends, a Frobenius norm over all adapted layers: A and B of lora-sam (default "
        f"{IN_FORCE['rho']['lora-sam']}), W of sam (by --rho_rise), the second LoRA's product of bi-lora "
        f"({IN_FORCE['rho']['bi-lora']}, our choice)",
        min=0,
        before=None,
    )
    rho_rise: float | None = setting(
        None,
        "sam only, where --rho is left out: before the first step find the rho by which ascending makes the loss rise "
        f"by this share, to first order; default {IN_FORCE['rho_rise']['sam']:g}, best on the tiny base",
        min=0.0001,
        max=10,
        before=None,
    )
    bar_strength: float | None = setting(
        None,
        "nbar and obar only: A and B are rescaled by so many times the learning rate, less by a cosine as the run "
        f"goes on; default {IN_FORCE['bar_strength']['nbar']}",
        min=0,
        before=None,
    )
    perturb_seed: int | None = setting(None, "seed of eps alone; default: --seed", min=0, max=2**63 - 1)
    perturb_noise: NoiseKind = setting(
        "filter", "eps scaled to each filter as in Eq. 7, or iid: the same energy spread evenly over a layer"
    )
    perturb_draw: DrawKind = setting(
        "low_rank",
        "eps of two thin factors, with the variances of Eq. 7 and no correlations either, from far fewer numbers and "
        "in less time; full: each entry drawn by itself, the letter of Eq. 7; philox: likewise, with numbers that are "
        "the same on CPU and GPU, drawn by a Triton kernel on CUDA",
        before="full",
    )
    perturb_norm_every: int = setting(
        10, "optimizer steps between two measurements of the norms that scale eps; 1 in the paper", min=1, before=1
    )
    perturb_per: PerturbPer = setting(
        "microbatch",
        "a new eps for each micro-batch, one for each optimizer step as in the paper, or one for each example of a "
        "micro-batch, which needs --perturb_draw low_rank",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in unused_by(self.method):
            if getattr(self, name) is not None:
                raise ConfigError(_unread(self, name))
        if self.perturb_per == "example" and self.method == "factor-noise":
            raise ConfigError(
                "--perturb_per example draws an eps of W for each image, but --method factor-noise draws none of W; "
                "use --perturb_per microbatch or --method flat-lora"
            )
        if self.perturb_per == "example" and self.perturb_draw != "low_rank" and self.perturbs_weights:
            raise ConfigError(
                f"--perturb_per example needs thin draws, but perturb_draw={self.perturb_draw} was given; use "
                "--perturb_draw low_rank or --perturb_per microbatch"
            )

    @property
    def draws_noise(self) -> bool:
        """Whether noise is drawn, so that there is a sigma."""
        return self.method in NOISY

    @property
    def perturbs_weights(self) -> bool:
        """Whether it is eps of W, by `perturb_draw`."""
        return self.method in PERTURBING

    @property
    def strength(self) -> float:
        """The sigma in force: 0 where no eps is drawn."""
        return self._in_force("sigma")

    @property
    def rise(self) -> float:
        """How much eps is to make the loss rise, as a share of it, by a `rising` still to be found; 0 with one."""
        return 0.0 if getattr(self, self.rising) is not None else self._in_force(f"{self.rising}_rise")

    @property
    def rising(self) -> Literal["sigma", "rho"]:
        """The setting that a rise of the loss finds."""
        return "rho" if self.method in IN_FORCE["rho_rise"] else "sigma"

    @property
    def radius(self) -> float:
        """The rho in force, 0 where nothing ascends; SAM's until a rise has found one, and in runs without a rise."""
        return self._in_force("rho")

    @property
    def balance(self) -> float:
        """The strength in force of nbar and obar."""
        return self._in_force("bar_strength")

    @property
    def share(self) -> float:
        """The share of the gradient that mixed-noise takes at W + eps."""
        return self._in_force("noise_share")

    def _in_force(self, name: str) -> float:
        given: float | None = getattr(self, name)
        return IN_FORCE[name].get(self.method, 0.0) if given is None else given
