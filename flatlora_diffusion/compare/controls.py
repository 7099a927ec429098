"""Nulls: runs that should be equal, or that differ by chance alone, and how far they lie apart: the yardstick for all
else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from flatlora_diffusion.compare.arms import Arm, arm_name
from flatlora_diffusion.compare.findings import HELDOUT_LOSS, Values
from flatlora_diffusion.config import methods_with
from flatlora_diffusion.storage.rng import derive_seed

SIGMA_0, OTHER_DRAWS, SECOND_EPS = "sigma-0", "other-draws", "second-eps"


_SAME = "The same method: 0 on a CPU, rounding on a GPU."
_CHANCE = "From the same first weights: chance alone."
_EPS = "What the choice of eps does alone."
_METHOD = "The method itself, to be read against the lines above."


@dataclass(frozen=True)
class Null:
    """An arm that differs from one of those that are compared by chance alone, or not at all."""

    arm: Arm
    against: Arm
    says: str


@dataclass(frozen=True)
class RunOutputs:
    """A run's LoRA file, and its pictures of the prompts and seeds that other runs have too."""

    lora: Path
    pictures: Sequence[Path]


def nulls_of(arms: Sequence[Arm], seed: int, init_seed: int | None = None) -> list[Null]:
    """The nulls of the methods that are compared, for the run of `seed`, and of no other method.

    The first arm with other draws; of the first arm with eps, another one; and Flat-LoRA at sigma 0 where it is
    compared with the LoRA that this must equal. `init_seed` is that of the first weights, where it is not `seed`.
    """
    first = arms[0]
    draws = {
        "seed": derive_seed(seed, "other draws"),
        "lora_init_seed": seed if init_seed is None else init_seed,
        **first.changes,
    }
    found = [_at_sigma_0(arms), Null(_like(first, OTHER_DRAWS, "with other draws", draws), first, _CHANCE)]
    noisy = next((arm for arm in arms if arm.method in methods_with("perturb_seed")), None)
    if noisy is not None:
        eps = {**noisy.changes, "perturb_seed": derive_seed(seed, "second eps")}
        found.append(Null(_like(noisy, SECOND_EPS, "with another eps", eps), noisy, _EPS))
    return [null for null in found if null is not None]


def null_rows(
    arms: Sequence[Arm], nulls: Sequence[Null], outputs: Mapping[str, RunOutputs], values: Values, seed: int
) -> list[dict[str, Any]]:
    """For each null, and for each arm against the first: mean difference of pixels (0 to 255), relative one of
    weights, and that of the held-out loss."""
    pairs = [(null.arm, null.against, null.says) for null in nulls]
    rows = []
    for arm, against, says in [*pairs, *((arm, arms[0], _METHOD) for arm in arms[1:])]:
        one, other = outputs[arm.key], outputs[against.key]
        moved = values[arm.key][seed][HELDOUT_LOSS] - values[against.key][seed][HELDOUT_LOSS]
        rows.append(
            {
                "name": f"{arm.name} against {against.name}",
                "says": f"{says} Held-out loss: {moved:+.6f}.",
                "picture_difference": _picture_difference(one.pictures, other.pictures),
                "weight_difference": _weight_difference(one.lora, other.lora),
                "heldout_difference": moved,
            }
        )
    return rows


def _at_sigma_0(arms: Sequence[Arm]) -> Null | None:
    """Flat-LoRA without its noise, where it and a LoRA that has all else alike are compared."""
    for flat in (arm for arm in arms if arm.method == "flat-lora"):
        alike = {
            name: value
            for name, value in flat.changes.items()
            if "lora" in methods_with(name)  # the others shape the noise
        }
        plain = next((arm for arm in arms if arm.method == "lora" and arm.changes == alike), None)
        if plain is not None:
            name = f"{arm_name('flat-lora', alike)} at sigma 0"
            return Null(Arm(SIGMA_0, name, "null", "flat-lora", {**alike, "sigma": 0.0}), plain, _SAME)
    return None


def _like(arm: Arm, key: str, how: str, changes: Mapping[str, Any]) -> Arm:
    return Arm(key, f"{arm.name} {how}", "null", arm.method, changes)


def _picture_difference(one: Sequence[Path], other: Sequence[Path]) -> float:
    pairs = zip(one, other, strict=True)
    return float(np.mean([np.abs(_pixels(first) - _pixels(second)).mean() for first, second in pairs]))


def _pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)


def _weight_difference(one: Path, other: Path) -> float | None:
    """The norm of the difference of the factors of all layers over the norm of those of `other`."""
    first, second = load_file(one), load_file(other)
    if first.keys() != second.keys() or any(first[name].shape != second[name].shape for name in first):
        return None
    apart = sum(float((first[name].double() - second[name].double()).square().sum()) for name in first)
    return float((apart / sum(float(second[name].double().square().sum()) for name in second)) ** 0.5)
