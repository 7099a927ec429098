"""`ADAPTERS`: each value of --adapter in one row, as `METHODS` has those of --method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flatlora_diffusion.config.setting import Choice


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter.

    Attributes:
        title: its name as people read it.
        help: its clause in the help of --adapter.
        hint: the same for people who do not read papers.
        defaults: settings that only some adapters have, with the value in force where they are left open.
        start: `module:function` that takes a model with the new adapter, its PEFT config, the `AdapterConfig` and the
            seed, and moves the weights to where training starts; None for PEFT's own LoRA.
        directions: directions of W or of its gradient that a rank starts at, 0 for random ones.
        is_lora: whether it trains the two factors A and B of a LoRA.
        is_linear_only: whether convolutions cannot have it.
        starts_away: whether W + BA differs from W before the first step by what is subtracted again.
        bytes_per_weight: device memory beside gradient and optimizer, per trained weight.
    """

    title: str
    help: str
    hint: str = ""
    defaults: Mapping[str, int] = field(default_factory=dict)
    start: str | None = None
    directions: int = 0
    is_lora: bool = True
    is_linear_only: bool = False
    starts_away: bool = False
    bytes_per_weight: int = 0


_PACKAGE = "flatlora_diffusion.adapter"

ADAPTERS: dict[str, AdapterSpec] = {
    "lora": AdapterSpec("LoRA", "lora"),
    "pissa": AdapterSpec(
        "PiSSA",
        "pissa, which starts at W's largest directions (arXiv:2404.02948) and is saved as a LoRA of twice the rank",
        defaults={"pissa_iterations": 4},
        start=f"{_PACKAGE}.svd_start:start_pissa",
        directions=1,
        is_linear_only=True,
        starts_away=True,
    ),
    "lora-ga": AdapterSpec(
        "LoRA-GA",
        "lora-ga, which starts at the largest directions of the first gradients (arXiv:2407.05000) and is saved as a "
        "LoRA of twice the rank",
        defaults={"lora_ga_steps": 8},
        start=f"{_PACKAGE}.svd_start:prepare_lora_ga",
        directions=2,  # A at other ones than B
        is_linear_only=True,
        starts_away=True,
    ),
    "adalora": AdapterSpec(
        "AdaLoRA",
        "adalora, which begins with 1.5 times the rank and drops the ranks that matter least over all layers until "
        "--rank is the mean (arXiv:2303.10512)",
        is_lora=False,
        is_linear_only=True,
        bytes_per_weight=12,
    ),
    "full": AdapterSpec(
        "Full",
        "full, which trains all weights of each layer and saves the merged pipeline beside a LoRA of --rank by SVD",
        start=f"{_PACKAGE}.full:start_full",
        is_lora=False,
        is_linear_only=True,
    ),
}


if TYPE_CHECKING:
    Adapter = str  # values are plain texts
else:

    class Adapter(Choice):
        """A value of --adapter."""

        rows = ADAPTERS


def default_of_adapter(setting: str, adapter: str) -> int | None:
    """The value of `setting` in force for `adapter` where it is left open; None if the adapter does not have it."""
    return ADAPTERS[adapter].defaults.get(setting)


def adapters_with(setting: str) -> tuple[str, ...]:
    """The adapters that read `setting`; all of them for a setting of no adapter in particular."""
    return tuple(name for name, row in ADAPTERS.items() if setting in row.defaults) or tuple(ADAPTERS)
