"""Paired differences over seeds: mean, confidence interval and smallest detectable difference."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8
# The points at which two runs are compared: at equal steps, at the ends, at equal unperturbed loss, after equal time.
STEPS, ENDS, CLEAN_LOSS, SECONDS = "steps", "ends", "clean loss", "seconds"


@dataclass(frozen=True)
class PairedDifference:
    """The mean of `differences`, one for each seed, with its interval; None for one seed or equal differences.

    `detectable` is the smallest true difference that a test at this confidence finds with 80 % power, for the observed
    spread.
    """

    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    detectable: float | None

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def margin(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean


def paired_difference(
    values: Sequence[float], reference: Sequence[float], confidence: float = CONFIDENCE
) -> PairedDifference:
    """Return values - reference, seed by seed, with Student's t interval. Raises ValueError for unequal lengths."""
    if len(values) != len(reference) or not values:
        raise ValueError(f"{len(values)} and {len(reference)} values are not pairs")
    differences = tuple(value - other for value, other in zip(values, reference, strict=True))
    mean = statistics.fmean(differences)
    if len(differences) > 1 and not any(differences):
        return PairedDifference(differences, mean, 0.0, 0.0, 0.0)
    rounding = 4 * sys.float_info.epsilon * max(map(abs, (*values, *reference)))
    if len(differences) < 2 or max(differences) - min(differences) <= rounding:
        return PairedDifference(differences, mean, None, None, None)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    low, high = stats.t.interval(confidence, len(differences) - 1, loc=mean, scale=error)
    smallest = detectable(error, len(differences) - 1, confidence)
    return PairedDifference(differences, mean, float(low), float(high), smallest)


def detectable(error: float, freedom: float, confidence: float = CONFIDENCE) -> float:
    """Return the difference that a two-sided t test with this standard error finds with probability `POWER`."""
    critical = stats.t.ppf((1 + confidence) / 2, freedom)

    def missing_power(shift: float) -> float:
        power = stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift)
        return float(power - POWER) if math.isfinite(power) else 1 - POWER

    return error * float(optimize.brentq(missing_power, 1e-3, 100 * critical))
