"""Controls: runs that must equal an arm, or differ from it by chance alone; their differences are the yardstick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from flatlora_diffusion.compare.arms import Arm, arm_name
from flatlora_diffusion.compare.findings import HELDOUT_LOSS, Values
from flatlora_diffusion.compare.pictures import read_picture
from flatlora_diffusion.config import methods_with
from flatlora_diffusion.storage.rng import derive_seed

SIGMA_0, OTHER_DRAWS, SECOND_EPS = "sigma-0", "other-draws", "second-eps"

_SAME_METHOD = "The same method: exactly 0 on a CPU, rounding on a GPU."
_CHANCE = "Same initial weights, other draws: the effect of chance alone."
_EPS = "The effect of the choice of eps alone."
_METHOD = "The effect of the method, to be compared with the rows above."


@dataclass(frozen=True)
class Control:
    """An arm that differs from a compared arm by chance alone, or not at all."""

    arm: Arm
    against: Arm
    explanation: str


@dataclass(frozen=True)
class RunOutputs:
    """A run's LoRA file, and its pictures of the prompts and seeds that all runs share."""

    lora: Path
    pictures: Sequence[Path]


def make_controls(arms: Sequence[Arm], seed: int, init_seed: int | None = None) -> list[Control]:
    """Choose the controls of the compared methods for the runs of `seed`, whose initial weights may have another seed.

    They are Flat-LoRA at sigma 0 if it is compared with an otherwise equal LoRA; the first arm with other draws; and
    the first arm with noise with another eps.
    """
    first = arms[0]
    draws = {
        "seed": derive_seed(seed, "other draws"),
        "lora_init_seed": seed if init_seed is None else init_seed,
        **first.changes,
    }
    controls = [_at_sigma_0(arms), Control(_variant(first, OTHER_DRAWS, "with other draws", draws), first, _CHANCE)]
    noisy = next((arm for arm in arms if arm.method in methods_with("perturb_seed")), None)
    if noisy is not None:
        eps = {**noisy.changes, "perturb_seed": derive_seed(seed, "second eps")}
        controls.append(Control(_variant(noisy, SECOND_EPS, "with another eps", eps), noisy, _EPS))
    return [control for control in controls if control is not None]


def control_rows(
    arms: Sequence[Arm], controls: Sequence[Control], outputs: Mapping[str, RunOutputs], values: Values, seed: int
) -> list[dict[str, Any]]:
    """Compare each control with its arm, and each arm with the first: mean pixel difference (0 to 255), relative
    difference of weights, and difference of held-out loss.
    """
    pairs = [(control.arm, control.against, control.explanation) for control in controls]
    rows = []
    for arm, against, explanation in [*pairs, *((arm, arms[0], _METHOD) for arm in arms[1:])]:
        first, second = outputs[arm.key], outputs[against.key]
        difference = values[arm.key][seed][HELDOUT_LOSS] - values[against.key][seed][HELDOUT_LOSS]
        rows.append(
            {
                "name": f"{arm.name} against {against.name}",
                "says": f"{explanation} Held-out loss: {difference:+.6f}.",
                "picture_difference": _picture_difference(first.pictures, second.pictures),
                "weight_difference": _weight_difference(first.lora, second.lora),
                "heldout_difference": difference,
            }
        )
    return rows


def _at_sigma_0(arms: Sequence[Arm]) -> Control | None:
    """Flat-LoRA without noise, if a Flat-LoRA arm and an otherwise equal LoRA arm are compared."""
    for flat in (arm for arm in arms if arm.method == "flat-lora"):
        shared = {
            name: value
            for name, value in flat.changes.items()
            if "lora" in methods_with(name)  # the other settings shape the noise
        }
        plain = next((arm for arm in arms if arm.method == "lora" and arm.changes == shared), None)
        if plain is not None:
            name = f"{arm_name('flat-lora', shared)} at sigma 0"
            return Control(Arm(SIGMA_0, name, "null", "flat-lora", {**shared, "sigma": 0.0}), plain, _SAME_METHOD)
    return None


def _variant(arm: Arm, key: str, suffix: str, changes: Mapping[str, Any]) -> Arm:
    return Arm(key, f"{arm.name} {suffix}", "null", arm.method, changes)


def _picture_difference(first: Sequence[Path], second: Sequence[Path]) -> float:
    return float(np.mean([np.abs(_pixels(a) - _pixels(b)).mean() for a, b in zip(first, second, strict=True)]))


def _pixels(file: Path) -> np.ndarray:
    return np.asarray(read_picture(file), dtype=np.float64)


def _weight_difference(first: Path, second: Path) -> float | None:
    """||first - second|| / ||second|| over the factors of all layers; None if the layers or ranks differ."""
    a, b = load_file(first), load_file(second)
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return None
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return float((difference / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5)
