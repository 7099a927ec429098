"""How the gradient of a step is taken: the methods, and the settings of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.section import ConfigError, Section, setting

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
PERTURBING = ("flat-lora", "mixed-noise")
"""Those that draw eps of W."""
NOISY = (*PERTURBING, "factor-noise")
"""Those that draw noise, and so have a sigma."""
DEFAULT_SIGMA = 0.1
BALANCING = ("nbar", "obar")
DEFAULT_RHO: dict[str, float] = {"lora-sam": 0.003, "sam": 0.05, "bi-lora": 0.05}
"""The radius of each method that ascends."""


def unused_by(method: str) -> tuple[str, ...]:
    """The settings of other methods, which must be left open for this one."""
    unused = (
        ("sigma", method in NOISY),
        ("rho", method in DEFAULT_RHO),
        ("noise_share", method == "mixed-noise"),
        ("bar_strength", method in BALANCING),
    )
    return tuple(name for name, is_used in unused if not is_used)


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
        f"relative radius of eps, flat-lora, mixed-noise and factor-noise only; default {DEFAULT_SIGMA}; 0.05 to 0.1 "
        "in the paper",
        min=0,
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
        "mixed-noise only: share of the gradient that is taken at W + eps, the rest at W; default 0.5 "
        "(arXiv:2404.00357)",
        min=0,
        max=1,
        before=None,
    )
    rho: float | None = setting(
        None,
        "radius of what ascends, a Frobenius norm over all adapted layers: A and B of lora-sam (default 0.003), W of "
        "sam (0.05), the second LoRA's product of bi-lora (0.05, our choice)",
        min=0,
        before=None,
    )
    bar_strength: float | None = setting(
        None,
        "nbar and obar only: A and B are rescaled by so many times the learning rate, less by a cosine as the run "
        "goes on; default 0.25",
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
        if not self.draws_noise and self.sigma is not None:
            raise ConfigError(
                f"--method {self.method} has no perturbation, but sigma={self.sigma:g} was given; "
                "leave --sigma out or use --method flat-lora"
            )
        if self.rho is not None and self.method not in DEFAULT_RHO:
            raise ConfigError(
                f"--method {self.method} ascends nowhere, but rho={self.rho:g} was given; leave --rho out or use "
                f"--method {' or '.join(DEFAULT_RHO)}"
            )
        if self.noise_share is not None and self.method != "mixed-noise":
            raise ConfigError(
                f"--method {self.method} mixes no gradients, but noise_share={self.noise_share:g} was given; leave "
                "--noise_share out or use --method mixed-noise"
            )
        if self.bar_strength is not None and self.method not in BALANCING:
            raise ConfigError(
                f"--method {self.method} balances nothing, but bar_strength={self.bar_strength:g} was given; leave "
                "--bar_strength out or use --method nbar or obar"
            )
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
        if not self.draws_noise:
            return 0.0
        return DEFAULT_SIGMA if self.sigma is None else self.sigma

    @property
    def radius(self) -> float:
        """The rho in force: 0 where nothing ascends."""
        return DEFAULT_RHO.get(self.method, 0.0) if self.rho is None else self.rho

    @property
    def balance(self) -> float:
        """The strength in force of nbar and obar."""
        return 0.25 if self.bar_strength is None else self.bar_strength

    @property
    def share(self) -> float:
        """The share of the gradient that mixed-noise takes at W + eps."""
        return 0.5 if self.noise_share is None else self.noise_share
