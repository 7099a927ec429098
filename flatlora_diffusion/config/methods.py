"""`METHODS`: each value of --method in one row, with all that is said of it outside of its own file.

The command line, the form, `compare`, the estimates of time and memory, the charts and the documentation read the row;
`build` names the function that makes the gradient. So a new method is a file in `method/rivals/` and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flatlora_diffusion.config.setting import Choice

DEFAULT_SIGMA = 0.1


@dataclass(frozen=True)
class MethodSpec:
    """One method.

    Attributes:
        title: its name as people read it.
        help: its clause in the help of --method.
        hint: the same for people who do not read papers; none for the two methods of the form's first line.
        build: `module:function` that takes `GradientInputs` and returns a `StepGradient`.
        defaults: settings that only some methods have, with the value in force where they are left open.
        reads: further settings that mean something for some methods alone.
        passes: time of a training step in passes of one image through the UNet while a picture is drawn.
        gradients: backward passes in a step.
        bytes_per_weight: device memory beside LoRA, gradient and optimizer, per trained weight.
        rehearse: `module:function` that runs a step's passes on meta tensors where they hold more than plain ones.
        excludes: adapters and optimizers that the method cannot be used with.
        adds_to_weights: whether layers compute with W plus something, which DoRA would have to rescale.
        allows_prior_from_base: whether --prior_from_base can be used.
        look: how charts draw it, a name of `charts/palette.py`.
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
    rehearse: str | None = None
    excludes: tuple[str, ...] = ()
    adds_to_weights: bool = False
    allows_prior_from_base: bool = False
    look: str = "third"


_METHOD, _RIVALS = "flatlora_diffusion.method", "flatlora_diffusion.method.rivals"
_OF_NOISE = (
    *("sigma_schedule", "sigma_ramp_steps", "perturb_seed", "perturb_per"),
    *("perturb_noise", "perturb_draw", "perturb_norm_every"),
)

# The passes are steps of `benchmarks/train_step.py` against a picture that is drawn, both on 2 CPU cores, or follow
# from the passes of the method. Flat-LoRA's are 1.0 times LoRA's with attention layers alone, and 1.2 times with the
# tiny base's convolutions.
METHODS: dict[str, MethodSpec] = {
    "lora": MethodSpec(
        title="LoRA",
        help="lora trains at W alone",
        hint="",
        build=f"{_METHOD}.gradient:plain_gradient",
        allows_prior_from_base=True,
        look="lora",
    ),
    "flat-lora": MethodSpec(
        title="Flat-LoRA",
        help="flat-lora at W + eps (arXiv:2409.14396)",
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
        help="lora-sam where A and B have ascended by --rho, in two passes (arXiv:2010.01412)",
        hint="SAM over the LoRA factors A and B; twice the time for each step",
        build=f"{_RIVALS}.sam:lora_sam",
        defaults={"rho": 0.003},
        passes=5.0,
        gradients=2,
        bytes_per_weight=8,
        excludes=("full", "lora-pro"),
    ),
    "sam": MethodSpec(
        title="SAM",
        help="sam where W has, in two passes",
        hint="SAM over the base's weights; twice the time for each step; better on subjects that the base cannot draw",
        build=f"{_RIVALS}.sam:sam",
        defaults={"rho": 0.05, "rho_rise": 0.25},
        passes=6.0,
        gradients=2,
        rehearse=f"{_RIVALS}.sam:rehearse",
        adds_to_weights=True,
    ),
    "bi-lora": MethodSpec(
        title="Bi-LoRA",
        help="bi-lora beside a second LoRA that ascends and is dropped at the end (arXiv:2508.19564)",
        hint="trains against a second, adversarial LoRA that is dropped at the end",
        build=f"{_RIVALS}.bi_lora:bi_lora",
        defaults={"rho": 0.05},
        passes=3.0,
        bytes_per_weight=8,
        rehearse=f"{_RIVALS}.bi_lora:rehearse",
        excludes=("full",),
        adds_to_weights=True,
    ),
    "nbar": MethodSpec(
        title="nBAR",
        help="nbar balances A and B by their gradients (arXiv:2410.14802)",
        hint="balances the LoRA factors A and B by the norms of their gradients",
        build=f"{_RIVALS}.balance:balanced",
        defaults={"bar_strength": 0.25},
        excludes=("adalora", "full", "lora-pro"),
    ),
}


if TYPE_CHECKING:
    Method = str  # values are plain texts
else:

    class Method(Choice):
        """A value of --method."""

        rows = METHODS


def default_of(setting: str, method: str) -> float | None:
    """The value of `setting` in force for `method` where it is left open; None if the method does not have it."""
    return METHODS[method].defaults.get(setting)


def method_settings() -> tuple[str, ...]:
    """The settings that tell methods apart, so that they belong to an arm of a comparison."""
    return tuple(dict.fromkeys(name for row in METHODS.values() for name in row.defaults))


def methods_with(setting: str) -> tuple[str, ...]:
    """The methods that read `setting`; all of them for a setting of no method in particular."""
    found = tuple(name for name, row in METHODS.items() if setting in row.defaults or setting in row.reads)
    return found or tuple(METHODS)


def unused_by(method: str) -> tuple[str, ...]:
    """The settings of other methods, which must be left open for this one; none for a name that is no method."""
    if method not in METHODS:
        return ()
    return tuple(name for name in method_settings() if name not in METHODS[method].defaults)


def by_method(method: str) -> dict[str, str | None]:
    """The changes that turn any config into one of `method`: its name, and the settings of other methods left open."""
    return {"method": method, **dict.fromkeys(unused_by(method))}
