"""How far runs lie apart that should be equal, or that differ by chance alone: the yardstick for all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from flatlora_diffusion.compare.arms import OTHER_DRAWS, SECOND_EPS, SIGMA_0
from flatlora_diffusion.compare.findings import HELDOUT_LOSS, Values

_PAIRS = (
    (SIGMA_0, "lora", "Flat-LoRA at sigma 0 against LoRA", "The same method: 0 on a CPU, rounding on a GPU."),
    (OTHER_DRAWS, "lora", "LoRA with other draws against LoRA", "From the same first weights: chance alone."),
    (SECOND_EPS, "flat-lora", "Flat-LoRA with another eps against Flat-LoRA", "What the choice of eps does alone."),
    ("flat-lora", "lora", "Flat-LoRA against LoRA", "The method itself, to be read against the lines above."),
)


@dataclass(frozen=True)
class RunOutputs:
    """A run's LoRA file, and its pictures of the prompts and seeds that other runs have too."""

    lora: Path
    pictures: Sequence[Path]


def null_rows(outputs: Mapping[str, RunOutputs], values: Values, seed: int) -> list[dict[str, Any]]:
    """For each pair: mean difference of pixels (0 to 255), relative one of weights, and that of the held-out loss."""
    rows = []
    for key, against, name, says in _PAIRS:
        if key not in outputs or against not in outputs:
            continue
        one, other = outputs[key], outputs[against]
        moved = values[key][seed][HELDOUT_LOSS] - values[against][seed][HELDOUT_LOSS]
        rows.append(
            {
                "name": name,
                "says": f"{says} Held-out loss: {moved:+.6f}.",
                "picture_difference": _picture_difference(one.pictures, other.pictures),
                "weight_difference": _weight_difference(one.lora, other.lora),
                "heldout_difference": moved,
            }
        )
    return rows


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
