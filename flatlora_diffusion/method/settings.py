"""The settings of one model's perturbation, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_args

from flatlora_diffusion.config import ConfigError, DrawKind, NoiseKind, SigmaSchedule
from flatlora_diffusion.method.draw import Draw
from flatlora_diffusion.method.example_draw import ExampleDraw
from flatlora_diffusion.method.full_draw import FullDraw, PhiloxDraw
from flatlora_diffusion.method.low_rank_draw import LowRankDraw

_DRAWS: dict[DrawKind, type[Draw]] = {"full": FullDraw, "philox": PhiloxDraw, "low_rank": LowRankDraw}


@dataclass(frozen=True)
class Settings:
    """What `FlatLora` takes beside the model. Raises ConfigError for a value that is not allowed."""

    sigma: float
    schedule: SigmaSchedule
    total_steps: int
    seed: int
    noise: NoiseKind
    prefix: str
    draw: DrawKind
    norm_every: int
    per_example: bool = False

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, SigmaSchedule)
        _check_choice("noise", self.noise, NoiseKind)
        _check_choice("draw", self.draw, DrawKind)
        check_whole("total_steps", self.total_steps, 1)
        check_whole("seed", self.seed, 0)
        check_whole("norm_every", self.norm_every, 1)
        check_sigma(self.sigma)
        if self.per_example and self.draw != "low_rank":
            raise ConfigError(f"draw={self.draw!r} has one eps for all examples; per_example needs draw='low_rank'")

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Settings:
        """The settings of a `state_dict`, in that of an earlier version those that it lacks as it worked then."""
        whole = {"draw": "full", "norm_every": 1, "per_example": False, **state}
        names = [item.name for item in fields(cls)]
        if set(whole) != set(names):
            raise ConfigError(f"FlatLora state has keys {sorted(state)}, expected {sorted(names)}")
        return cls(**whole)

    @property
    def draws(self) -> type[Draw]:
        """What eps is made by."""
        return ExampleDraw if self.per_example else _DRAWS[self.draw]

    def sigma_at(self, step: int) -> float:
        """sigma at the 0-based optimizer `step`; from `total_steps` on a ramp stays at its end."""
        return scheduled(self.sigma, self.schedule, self.total_steps, step)


def scheduled(sigma: float, schedule: SigmaSchedule, total_steps: int, step: int) -> float:
    """sigma at the 0-based optimizer `step`; from `total_steps` on a ramp stays at its end."""
    progress = min(max(step, 0) / total_steps, 1.0)
    if schedule in ("cosine", "down"):
        risen = (1 - math.cos(math.pi * progress)) / 2
        return sigma * (risen if schedule == "cosine" else 1 - risen)
    return sigma * progress if schedule == "linear" else sigma


def check_sigma(sigma: float) -> None:
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ConfigError(f"sigma={sigma} must be a finite number of at least 0; 0.05 to 0.15 is usual")


def check_whole(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {low}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")
