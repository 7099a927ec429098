"""The settings of a model's noise, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_args

from flatlora_diffusion.config import DEFAULT_SIGMA, ConfigError, DrawKind, NoiseKind, PerturbConfig, SigmaSchedule
from flatlora_diffusion.method.draw import Draw
from flatlora_diffusion.method.full_draw import FullDraw
from flatlora_diffusion.method.low_rank_draw import LowRankDraw

_DRAWS: dict[DrawKind, type[Draw]] = {"full": FullDraw, "low_rank": LowRankDraw}


@dataclass(frozen=True)
class NoiseConfig:
    """The noise of `FlatLora`: its size, its schedule and how it is drawn.

    Args:
        sigma: relative radius of the noise: E||eps_i||^2 = sigma^2 ||W'_i||^2. 0.05 to 0.15 in the paper.
        schedule: sigma over `total_steps`: `cosine` (0 to sigma), `constant`, or `down` (sigma to 0 by a cosine).
        total_steps: optimizer steps after which a ramp has reached its end.
        seed: eps is a function of (seed, prefix, layer name, step, slot) and of nothing else; low-rank draws depend on
            the order, sizes and devices of all layers in place of a layer's name.
        noise: `filter` is Eq. 7; `iid` gives every row of a layer the same std, at equal expected energy.
        prefix: keeps models apart that share layer names, such as SDXL's two text encoders.
        draw: `low_rank` has the mean and covariance of Eq. 7, 0 between any two entries, but its entries are not
            normal: eps = diag(row_std) U V^T / sqrt(k) with N(0, 1) in U (m, k) and V (n, k), k = 4. It takes
            k (m + n) numbers in place of m n. `full` draws every eps[i, j] by itself, the letter of Eq. 7.
        norm_every: optimizer steps between two measurements of ||W'_i||; the active adapters must not change in
            between. With more than 1, a resumed run needs `FlatLora.norm_state`.

    Raises:
        ConfigError: a setting out of range.
    """

    sigma: float = DEFAULT_SIGMA
    schedule: SigmaSchedule = "cosine"
    total_steps: int = 500
    seed: int = 0
    noise: NoiseKind = "filter"
    prefix: str = "unet"
    draw: DrawKind = "low_rank"
    norm_every: int = 1

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, SigmaSchedule)
        _check_choice("noise", self.noise, NoiseKind)
        _check_choice("draw", self.draw, DrawKind)
        check_whole("total_steps", self.total_steps, 1)
        check_whole("seed", self.seed, 0)
        check_whole("norm_every", self.norm_every, 1)
        check_sigma(self.sigma)

    @classmethod
    def from_settings(cls, settings: PerturbConfig, seed: int, total_steps: int = 500) -> NoiseConfig:
        """The config that a training's settings give; `seed` is for settings without a seed of eps."""
        return cls(
            sigma=settings.strength,
            schedule=settings.sigma_schedule,
            total_steps=settings.sigma_ramp_steps or total_steps,
            seed=seed if settings.perturb_seed is None else settings.perturb_seed,
            noise=settings.perturb_noise,
            draw=settings.perturb_draw,
            norm_every=settings.perturb_norm_every,
        )

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> NoiseConfig:
        """The config of a `state_dict`; settings that an earlier version did not have are as it worked then.

        Raises:
            ConfigError: a key is missing or unknown, or the state is of a setting that was removed.
        """
        whole = {"draw": "full", "norm_every": 1, **state}
        if whole.pop("per_example", False):
            raise ConfigError("FlatLora state has per_example=True, which this version does not have; train anew")
        names = [item.name for item in fields(cls)]
        if set(whole) != set(names):
            raise ConfigError(f"FlatLora state has keys {sorted(state)}, expected {sorted(names)}")
        return cls(**whole)

    @property
    def draws(self) -> type[Draw]:
        """The class that draws eps."""
        return _DRAWS[self.draw]

    def sigma_at(self, step: int) -> float:
        """sigma at the 0-based optimizer `step`; from `total_steps` on a ramp stays at its end."""
        if self.schedule == "constant":
            return self.sigma
        progress = min(max(step, 0) / self.total_steps, 1.0)
        risen = (1 - math.cos(math.pi * progress)) / 2
        return self.sigma * (risen if self.schedule == "cosine" else 1 - risen)


def check_sigma(sigma: float) -> None:
    """Raises ConfigError for a sigma that is negative or not finite."""
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ConfigError(f"sigma={sigma} must be a finite number of at least 0; 0.05 to 0.15 is usual")


def check_whole(name: str, value: int, low: int) -> None:
    """Raises ConfigError for a `value` of the setting `name` that is no int, or below `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {low}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")
