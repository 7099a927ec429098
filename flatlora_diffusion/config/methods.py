"""`METHODS`: a row for each value of --method with everything that other packages need to know of it.

Command line, form, `compare`, the time and memory estimates, charts and documentation read the row; `build` names the
function that creates its `StepGradient`. A new method is a file in `method/rivals/` and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flatlora_diffusion.config.setting import Choice

DEFAULT_SIGMA = 0.1


@dataclass(frozen=True)
class MethodSpec:
    """A value of --method.

    Attributes:
        title: its display name.
        help: its part of the help of --method.
        hint: explanation in the form of the app, without terms of papers; empty for the main methods.
        build: `module:function` that takes `GradientInputs` and returns a `StepGradient`.
        defaults: settings that only some methods have, with their default.
        reads: further settings that only some methods use.
        passes: time of a training step per image, in UNet forward passes of image generation.
        gradients: backward passes per step.
        bytes_per_weight: device memory per trained weight, without LoRA, gradient and optimizer state.
        meta_passes: `module:function` that runs the passes of a step on meta tensors, if they need more memory than
            those of LoRA.
        excludes: incompatible adapters and optimizers.
        adds_to_weights: whether it perturbs W in the forward pass, so that DoRA must rescale the perturbation.
        allows_prior_from_base: whether it supports --prior_from_base.
        look: its style in charts, a name of `charts/palette.py`.
    """

    title: str
    help: str
    hint: str
    build: str
    defaults: Mapping[str, float] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    passes: float = 2.5
    gradients: int = 1
    bytes_per_weight: int = 0
    meta_passes: str | None = None
    excludes: tuple[str, ...] = ()
    adds_to_weights: bool = False
    allows_prior_from_base: bool = False
    look: str = "third"


_METHOD, _RIVALS = "flatlora_diffusion.method", "flatlora_diffusion.method.rivals"
_OF_NOISE = (
    *("sigma_schedule", "sigma_ramp_steps", "perturb_seed", "perturb_per"),
    *("perturb_noise", "perturb_draw", "perturb_norm_every"),
)

# `passes` is measured by `benchmarks/train_step.py` on 2 CPU cores or follows from the passes of the method. Flat-LoRA
# takes 1.0 times the time of LoRA with attention layers and 1.2 times with the convolutions of the tiny base.
METHODS: dict[str, MethodSpec] = {
    "lora": MethodSpec(
        title="LoRA",
        help="lora (no perturbation)",
        hint="",
        build=f"{_METHOD}.gradient:plain_gradient",
        allows_prior_from_base=True,
        look="lora",
    ),
    "flat-lora": MethodSpec(
        title="Flat-LoRA",
        help="flat-lora (random noise on W in every step, arXiv:2409.14396)",
        hint="",
        build=f"{_METHOD}.gradient:noisy_gradient",
        defaults={"sigma": DEFAULT_SIGMA},
        reads=_OF_NOISE,
        passes=2.75,
        adds_to_weights=True,
        allows_prior_from_base=True,
        look="flat",
    ),
    "lora-sam": MethodSpec(
        title="LoRA-SAM",
        help="lora-sam (SAM on A and B, two passes per step, arXiv:2010.01412)",
        hint="SAM over the LoRA factors A and B; twice the time for each step",
        build=f"{_RIVALS}.sam:lora_sam_gradient",
        defaults={"rho": 0.003},
        passes=5.0,
        gradients=2,
        bytes_per_weight=8,
        excludes=("full", "lora-pro"),
    ),
    "sam": MethodSpec(
        title="SAM",
        help="sam (SAM on W, two passes per step)",
        hint="SAM over the base's weights; twice the time for each step; better on subjects that the base cannot draw",
        build=f"{_RIVALS}.sam:sam_gradient",
        defaults={"rho": 0.05, "rho_rise": 0.25},
        passes=6.0,
        gradients=2,
        meta_passes=f"{_RIVALS}.sam:meta_passes",
        adds_to_weights=True,
    ),
    "bi-lora": MethodSpec(
        title="Bi-LoRA",
        help="bi-lora (a second, adversarial LoRA during training, arXiv:2508.19564)",
        hint="trains against a second, adversarial LoRA that is dropped at the end",
        build=f"{_RIVALS}.bi_lora:bi_lora_gradient",
        defaults={"rho": 0.05},
        passes=3.0,
        bytes_per_weight=8,
        meta_passes=f"{_RIVALS}.bi_lora:meta_passes",
        excludes=("full",),
        adds_to_weights=True,
    ),
    "nbar": MethodSpec(
        title="nBAR",
        help="nbar (balances A and B by their gradients, arXiv:2410.14802)",
        hint="balances the LoRA factors A and B by the norms of their gradients",
        build=f"{_RIVALS}.balance:balanced_gradient",
        defaults={"bar_strength": 0.25},
        excludes=("adalora", "full", "lora-pro"),
    ),
}


if TYPE_CHECKING:
    Method = str  # values are plain strings
else:

    class Method(Choice):
        """A value of --method."""

        rows = METHODS


def default_of(setting: str, method: str) -> float | None:
    """Return the default of `setting` for `method`; None if the method does not have it."""
    return METHODS[method].defaults.get(setting)


def method_settings() -> tuple[str, ...]:
    """Return the settings that only some methods have; each arm of a comparison has its own values."""
    return tuple(dict.fromkeys(name for row in METHODS.values() for name in row.defaults))


def methods_with(setting: str) -> tuple[str, ...]:
    """Return the methods that use `setting`; all methods for a general setting."""
    names = tuple(name for name, row in METHODS.items() if setting in row.defaults or setting in row.reads)
    return names or tuple(METHODS)


def settings_not_of(method: str) -> tuple[str, ...]:
    """Return the settings of other methods, which must be None for `method`; empty for an unknown method."""
    if method not in METHODS:
        return ()
    return tuple(name for name in method_settings() if name not in METHODS[method].defaults)


def for_method(method: str) -> dict[str, str | None]:
    """Return the changes that turn any config into that of `method`: its name, and None for settings of others."""
    return {"method": method, **dict.fromkeys(settings_not_of(method))}
