"""The rivals of `paper_variants`: three settings of each to choose from, and what is compared with what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.paper_variants_plan import GIVEN, TRIAL_SEED, Group, arm
from flatlora_diffusion.config.methods import IN_FORCE

STRENGTHS = {
    **dict.fromkeys(("flat-lora", "mixed-noise", "factor-noise"), "sigma"),
    **dict.fromkeys(("lora-sam", "sam", "bi-lora"), "rho"),
    **dict.fromkeys(("nbar", "obar"), "bar_strength"),
}
"""Of each method the setting that says how strong it is."""
FLAT = "flat-lora"
ADAPTERS: tuple[tuple[float, dict[str, Any]], ...] = (
    (1, {}),
    (1, {"adapter": "rslora"}),
    (1, {"adapter": "dora"}),
    (1, {"adapter": "pissa"}),
    (1, {"adapter": "lora-ga"}),
    (2.5, {"adapter": "adalora"}),  # its singular values start at 0
    (0.15, {"adapter": "full", "rank": 1024}),  # of its file, which loses nothing
    (2.5 / 16, {"lora_plus_ratio": 16}),  # of A, which is slower
    (1, {"optimizer": "lora-pro"}),
)
"""Plain adapters and optimizers, and how many times the study's learning rate each likely needs."""
WEAKER_STRONGER = (0.4, 1, 2.5)
SLOWER_FASTER = (0.5, 1, 2)
LIKELY = 1  # of three, the one in the middle

Choices = dict[str, list[str]]


def method_choices(rate: float) -> Choices:
    """Arms by method: each at three strengths and the learning rate `rate`, LoRA at three learning rates."""
    return {"lora": adapter_choices(rate)["lora"]} | {
        method: _strengths(method, name) for method, name in STRENGTHS.items()
    }


def adapter_choices(rate: float) -> Choices:
    """Arms by adapter: each at three learning rates, Flat-LoRA at three strengths."""
    adapters = {arm("lora", **changes): _rates(factor * rate, rate, changes) for factor, changes in ADAPTERS}
    return adapters | {FLAT: _strengths(FLAT, STRENGTHS[FLAT])}


def trials_of(arms: list[str]) -> Group:
    """The runs that one of these arms is chosen by."""
    return Group(dict.fromkeys(arms, arms[0]), [TRIAL_SEED], trial=True)


def method_pairs(chosen: Mapping[str, str]) -> dict[str, str]:
    """Each method's chosen arm against LoRA's."""
    return dict.fromkeys((chosen[method] for method in STRENGTHS), chosen["lora"])


def adapter_pairs(chosen: Mapping[str, str]) -> dict[str, str]:
    """By each adapter's chosen arm: all against LoRA, then each flat, with Flat-LoRA's sigma, against plain."""
    lora, flat_lora = chosen["lora"], chosen[FLAT]
    adapters = [key for name, key in chosen.items() if name not in (FLAT, "lora")]
    flat_ones = {f"{flat_lora},{key.partition(':')[2]}": key for key in adapters}
    return dict.fromkeys([flat_lora, *adapters], lora) | flat_ones


def likely(choices: Choices) -> dict[str, str]:
    """What stands for the choice that is still to be made, by rival."""
    return {name: arms[LIKELY] for name, arms in choices.items()}


def _strengths(method: str, name: str) -> list[str]:
    """Around the method's default, not named where it is in force; of noise around the lead of earlier runs."""
    if name in GIVEN:
        return [arm(method, **GIVEN | {name: f"{factor * GIVEN[name]:g}"}) for factor in WEAKER_STRONGER]
    default, is_found = IN_FORCE[name][method], method in IN_FORCE.get(f"{name}_rise", {})
    return [
        arm(method) if factor == 1 and not is_found else arm(method, **{name: f"{factor * default:g}"})
        for factor in WEAKER_STRONGER
    ]


def _rates(middle: float, rate: float, changes: Mapping[str, Any]) -> list[str]:
    """Around an adapter's likely learning rate; the study's own is not named."""
    rates = [factor * middle for factor in SLOWER_FASTER]
    return [arm("lora", **changes, **({} if one == rate else {"learning_rate": f"{one:g}"})) for one in rates]
