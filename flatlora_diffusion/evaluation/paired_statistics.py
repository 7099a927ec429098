"""Paired differences over seeds: their mean, its interval, and the smallest difference that they could show."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8
# Where two runs are compared.
STEPS, ENDS, CLEAN_LOSS, SECONDS = "steps", "ends", "clean loss", "seconds"


@dataclass(frozen=True)
class PairedDifference:
    """`mean` of `differences` (one for each seed) with its interval; what these cannot say is None.

    One seed shows no spread, nor do seeds that differ by as much, as counts of a few pictures do.

    `detectable` is the smallest true difference that a test at this confidence finds with 80 % power, given the
    spread that was seen.
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
        """Half of the interval."""
        return None if self.high is None else self.high - self.mean


def paired_difference(
    values: Sequence[float], reference: Sequence[float], confidence: float = CONFIDENCE
) -> PairedDifference:
    """values - reference, seed by seed, with the 95 % interval of Student's t, or one of another confidence.

    Raises ValueError when the two are not pairs.
    """
    if len(values) != len(reference) or not values:
        raise ValueError(f"{len(values)} and {len(reference)} values are no pairs")
    differences = tuple(one - other for one, other in zip(values, reference, strict=True))
    mean = statistics.fmean(differences)
    if len(differences) > 1 and not any(differences):
        return PairedDifference(differences, mean, 0.0, 0.0, 0.0)
    rounding = 4 * sys.float_info.epsilon * max(map(abs, (*values, *reference)))
    if len(differences) < 2 or max(differences) - min(differences) <= rounding:
        return PairedDifference(differences, mean, None, None, None)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    low, high = stats.t.interval(confidence, len(differences) - 1, loc=mean, scale=error)
    found = detectable(error, len(differences) - 1, confidence)
    return PairedDifference(differences, mean, float(low), float(high), found)


def detectable(error: float, freedom: float, confidence: float = CONFIDENCE) -> float:
    """The difference that a two-sided t test of this standard error and these degrees of freedom finds by `POWER`."""
    critical = stats.t.ppf((1 + confidence) / 2, freedom)

    def missing_power(shift: float) -> float:
        power = stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift)
        return float(power - POWER) if math.isfinite(power) else 1 - POWER

    return error * float(optimize.brentq(missing_power, 1e-3, 100 * critical))
