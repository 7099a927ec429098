"""The arms of a study with the trials of each, and its sweeps.

A sweep changes one thing at a time, at the chosen settings of LoRA, and at Flat-LoRA's sigma for its pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from benchmarks.paper_study_settings import Settings, Variant
from flatlora_diffusion.config import SigmaSchedule

SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)
CONSTANT_SIGMAS = (0.05, 0.2, 0.8)
RANKS = (1, 4, 8, 16, 32)
RHOS = (0.001, 0.003, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5)  # the paper's
# The likeliest first: the first two are those of arms with a setting of their own.
RATES = (2e-3, 8e-4, 5e-3)
RATES_OF: dict[Variant, tuple[float, ...]] = {
    "adalora": (5e-3, 1e-2, 2e-2),  # its singular values start at 0, its vectors near it
    "lora+": (5e-3, 2e-3, 1e-2),  # of B, which is meant to be fast
    "full": (3e-4, 1e-4, 1e-3),
}
TRIALS = 3

Grid = list[dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """What an arm always has, the trials of which it chooses one, and what it is compared with."""

    fixed: dict[str, Any]
    grid: Grid
    against: str = "lora"


def _grid(rates: Sequence[float] = RATES, **choices: Sequence[Any]) -> Grid:
    """The learning rates; with a setting of the arm's own, two of them, and its second value with the first."""
    if not choices:
        return [{"lr": rate} for rate in rates]
    ((name, values),) = choices.items()
    return [{"lr": rate, name: value} for value in values for rate in rates[:2]][:TRIALS]


FLAT_SIGMAS = (0.1, 0.4)
# As many trials an arm: what it has for itself costs tries at the learning rate.
ARMS = {
    "lora": Arm({}, _grid()),
    "flat": Arm({}, _grid(sigma=FLAT_SIGMAS)),
    "flat low_rank": Arm({"draw": "low_rank"}, _grid(sigma=FLAT_SIGMAS)),
    "iid": Arm({"noise": "iid"}, _grid(sigma=FLAT_SIGMAS)),
    "lora-sam": Arm({}, _grid(rho=(0.01, 0.05))),
    "sam": Arm({"sam": "weights"}, _grid(rho=(0.01, 0.05))),
    "weight decay": Arm({}, _grid(weight_decay=(0.1, 1.0))),
    "dropout": Arm({}, _grid(dropout=(0.1, 0.3))),
}
# Table 5: each alone and with the flat loss.
VARIANT_ARMS = {
    name: Arm({"variant": name}, _grid(RATES_OF.get(name, RATES))) for name in get_args(Variant) if name != "lora"
}
VARIANT_ARMS |= {
    f"flat {name}": Arm(arm.fixed, _grid(RATES_OF.get(arm.fixed["variant"], RATES), sigma=FLAT_SIGMAS), name)
    for name, arm in list(VARIANT_ARMS.items())
}


@dataclass(frozen=True)
class Bout:
    """One arm of one task, with the settings that it has and what it is paired with."""

    arm: str
    against: str
    settings: Settings


def _sigmas(lora: Settings, *_: Any) -> list[Bout]:
    """All strengths, with a ramp and without, at LoRA's own learning rate."""
    strengths: dict[SigmaSchedule, tuple[float, ...]] = {"cosine": SIGMAS, "constant": CONSTANT_SIGMAS}
    return [
        Bout(f"sigma {sigma} {schedule}", "lora", replace(lora, sigma=sigma, schedule=schedule))
        for schedule, sigmas in strengths.items()
        for sigma in sigmas
    ]


def _ranks(lora: Settings, sigma: float, ranks: Sequence[int]) -> list[Bout]:
    """Figure 5: alpha stays as it is."""
    plain = {rank: Bout(f"rank {rank}", "lora", replace(lora, rank=rank)) for rank in ranks}
    flat = [Bout(f"flat rank {rank}", f"rank {rank}", replace(lora, rank=rank, sigma=sigma)) for rank in ranks]
    return [*plain.values(), *flat]


def _rhos(lora: Settings, *_: Any) -> list[Bout]:
    """SAM over A and B, and over W, at LoRA's own learning rate."""
    over = {"lora-sam": lora, "sam": replace(lora, sam="weights")}
    return [Bout(f"{arm} rho {rho}", "lora", replace(start, rho=rho)) for arm, start in over.items() for rho in RHOS]


SWEEPS: dict[str, Callable[[Settings, float, Sequence[int]], list[Bout]]] = {
    "sigmas": _sigmas,
    "ranks": _ranks,
    "variants": lambda *_: [],  # arms of their own, with trials
    "rhos": _rhos,
}
USUAL_SWEEPS = ["sigmas", "ranks", "variants"]  # the other takes two or three gradients a step
