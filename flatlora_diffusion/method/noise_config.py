"""The validated settings of the noise of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_args

from flatlora_diffusion.config import DEFAULT_SIGMA, ConfigError, DrawKind, NoiseKind, PerturbConfig, SigmaSchedule
from flatlora_diffusion.method.draw import Draw, FullDraw, LowRankDraw

_DRAWS: dict[DrawKind, type[Draw]] = {"full": FullDraw, "low_rank": LowRankDraw}


@dataclass(frozen=True)
class NoiseConfig:
    """Size, schedule and kind of the noise of `FlatLora`.

    Args:
        sigma: relative radius of the noise: E||eps_i||^2 = sigma^2 ||W'_i||^2. 0.05 to 0.15 in the paper.
        schedule: sigma over `total_steps`: `cosine` (0 to sigma), `constant`, or `down` (sigma to 0 by a cosine).
        total_steps: optimizer steps until the end of the schedule.
        seed: eps depends on (seed, prefix, layer name, step, slot) only; low-rank noise depends on the order, sizes
            and devices of all layers instead of the layer name.
        noise: `filter` is Eq. 7; `iid` gives every row of a layer the same std, at equal expected energy.
        prefix: distinguishes models that share layer names, such as SDXL's two text encoders.
        draw: `low_rank` has the mean and covariance of Eq. 7 but its entries are not normal:
            eps = diag(row_std) U V^T / sqrt(k) with N(0, 1) in U (m, k) and V (n, k), k = 4. `full` samples every
            eps[i, j] independently, exactly Eq. 7.
        norm_every: optimizer steps between two computations of ||W'_i||; the active adapters must not change in
            between. With more than 1, a resumed run needs `FlatLora.norm_state`.

    Raises:
        ConfigError: a setting is out of range.
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
        check_int("total_steps", self.total_steps, 1)
        check_int("seed", self.seed, 0)
        check_int("norm_every", self.norm_every, 1)
        check_sigma(self.sigma)

    @classmethod
    def from_settings(cls, settings: PerturbConfig, seed: int, total_steps: int = 500) -> NoiseConfig:
        """Return the config of a training run; `seed` is the seed of eps if the settings have none."""
        return cls(
            sigma=settings.effective_sigma,
            schedule=settings.sigma_schedule,
            total_steps=settings.sigma_ramp_steps or total_steps,
            seed=seed if settings.perturb_seed is None else settings.perturb_seed,
            noise=settings.perturb_noise,
            draw=settings.perturb_draw,
            norm_every=settings.perturb_norm_every,
        )

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> NoiseConfig:
        """Return the config of a `state_dict`, also of one that an earlier version has saved.

        Raises:
            ConfigError: a key is missing or unknown, or a removed setting was in use.
        """
        settings = {"draw": "full", "norm_every": 1, **state}
        if settings.pop("per_example", False):
            raise ConfigError(
                "FlatLora state has per_example=True, which was removed from this version; start a new training"
            )
        names = [item.name for item in fields(cls)]
        if set(settings) != set(names):
            raise ConfigError(
                f"FlatLora state has keys {sorted(state)}, expected {sorted(names)}; load a state_dict of FlatLora"
            )
        return cls(**settings)

    @property
    def draws(self) -> type[Draw]:
        """The class that samples eps."""
        return _DRAWS[self.draw]

    def sigma_at(self, step: int) -> float:
        """Return sigma at the 0-based optimizer `step`; it is constant from `total_steps` on."""
        if self.schedule == "constant":
            return self.sigma
        progress = min(max(step, 0) / self.total_steps, 1.0)
        ramp = (1 - math.cos(math.pi * progress)) / 2
        return self.sigma * (ramp if self.schedule == "cosine" else 1 - ramp)


def check_sigma(sigma: float) -> None:
    """Raise ConfigError for a sigma that is negative or not finite."""
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ConfigError(f"sigma={sigma} must be a finite number of at least 0; 0.05 to 0.15 is usual")


def check_int(name: str, value: int, low: int) -> None:
    """Raise ConfigError for a `value` of the setting `name` that is not an int or is below `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {low}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")
