"""Confidence intervals of a mean over seeds and images, for other seeds and other images of the same populations.

y[s, i] is a difference measured with training seed s on image i, a mean over its (noise, timestep) draws. With crossed
random effects, y[s, i] = mean + seed[s] + image[i] + rest[s, i], the variance of the mean of an S x I table is

    Var = (MS_S + MS_I - MS_SI) / (S I)

(Cornfield and Tukey, Ann. Math. Stat. 27, 1956), taken to be no less than the larger of MS_S and MS_I over S I. The
degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946), no less than min(S, I) - 1; with two seeds, 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from flatlora_diffusion.evaluation.paired_statistics import CONFIDENCE

FEWEST_IMAGES = 5  # for an interval over images with one seed


@dataclass(frozen=True)
class CrossedDifference:
    """The mean of an S x I table of differences with standard error and interval, None if undefined.

    `seed_share` and `image_share` are the shares of `error`^2 due to seeds and images; the rest is interaction and
    noise. With one seed the interval is over images only.
    """

    mean: float
    error: float | None
    low: float | None
    high: float | None
    freedom: float | None
    seeds: int
    images: int
    seed_share: float | None = None
    image_share: float | None = None

    @property
    def margin(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean

    @property
    def p(self) -> float | None:
        """The two-sided p-value of no difference."""
        if self.error is None or self.freedom is None:
            return None
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))


def crossed_difference(table: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> CrossedDifference:
    """Return the mean of a table (S seeds, I images) with its interval.

    With one seed the interval is over images only, and undefined for fewer than five images; with one image it is over
    seeds only. Raises ValueError for a table that is empty or has gaps.
    """
    values = np.asarray(table, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"differences of shape {values.shape} are not a table of seeds and images")
    seeds, images = values.shape
    mean = float(values.mean())
    if seeds == 1 or images == 1:
        count = max(seeds, images)
        if count == 1 or (seeds == 1 and images < FEWEST_IMAGES):
            return CrossedDifference(mean, None, None, None, None, seeds, images)
        variance, freedom = float(values.var(ddof=1)) / count, float(count - 1)
        shares = (0.0, 1.0) if seeds == 1 else (1.0, 0.0)
        return _with_interval(values, variance, freedom, shares, confidence)
    by_seed, by_image = values.mean(axis=1), values.mean(axis=0)
    ms_seed = images * float(by_seed.var(ddof=1))
    ms_image = seeds * float(by_image.var(ddof=1))
    rest = values - by_seed[:, None] - by_image[None, :] + mean
    ms_rest = float(np.square(rest).sum()) / ((seeds - 1) * (images - 1))
    total = max(ms_seed + ms_image - ms_rest, ms_seed, ms_image)
    freedom = _satterthwaite((ms_seed, seeds - 1), (ms_image, images - 1), (ms_rest, (seeds - 1) * (images - 1)))
    # With two seeds Satterthwaite's interval covers only 88 % if seeds and images have equal variance.
    fewest = min(seeds, images)
    freedom = 1.0 if fewest == 2 else max(freedom, fewest - 1.0)
    shares = (max(ms_seed - ms_rest, 0.0) / total, max(ms_image - ms_rest, 0.0) / total) if total else (0.0, 0.0)
    return _with_interval(values, total / values.size, freedom, shares, confidence)


def _satterthwaite(*squares: tuple[float, int]) -> float:
    """Return the degrees of freedom of MS_S + MS_I - MS_SI from (mean square, degrees of freedom) of each."""
    (ms_seed, _), (ms_image, _), (ms_rest, _) = squares
    total = ms_seed + ms_image - ms_rest
    spread = sum(square**2 / freedom for square, freedom in squares)
    return total**2 / spread if spread else 0.0


def _with_interval(
    values: np.ndarray, variance: float, freedom: float, shares: tuple[float, float], confidence: float
) -> CrossedDifference:
    seeds, images = values.shape
    mean, error = float(values.mean()), variance**0.5
    margin = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    return CrossedDifference(mean, error, mean - margin, mean + margin, freedom, seeds, images, *shares)
