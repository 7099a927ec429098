"""What the runs of `paper_variants` say: the checkpoints and cells chosen, paired differences, and the correction.

Checkpoints and cells are chosen by the loss on the search icons; the reported icons choose nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from benchmarks.paper_variants_plan import PAPER, Pairs
from flatlora_diffusion.compare.paired import CONFIDENCE, paired_difference
from flatlora_diffusion.compare.trajectory import TrajectoryPoint, at_equal_loss

Row = dict[str, Any]
"""The figures of one run."""
Result = dict[str, Any]
"""The contents of a part's JSON."""

METRICS = {
    "report": "held-out, at the end",
    "chosen": "held-out, chosen checkpoint",
    "equal_loss": "held-out, at equal clean loss",
    "train": "clean train",
    "flat": "flat icons",
    "rise": "loss rise",
    "name_found": "names found",
    "style_probability": "3D",
    "stronger": "held-out, strength 1.5",
    "stronger_flat": "flat icons, strength 1.5",
    "nf4": "held-out, base in NF4",
    "nf4_flat": "flat icons, base in NF4",
}
"""What is compared in pairs, by its key in a row."""


class Headline(NamedTuple):
    """A comparison that the page's answer may speak of: a part, the name of a pair in its result, and a metric."""

    part: str
    pair: str
    metric: str


HEADLINES = (
    Headline("map", "best cell", "report"),
    Headline("map", "best cell", "chosen"),
    Headline("tuned", "both tuned", "report"),
    Headline("tuned", "both tuned", "chosen"),
    Headline("draws", "Eq. 7 less iid", "report"),
    Headline("draws", "thin less full draws", "report"),
    Headline("controls", "against the best control", "report"),
    Headline("methods", "against Bi-LoRA", "report"),
    Headline("sam", "SAM", "report"),
    Headline("sam", "SAM", "chosen"),
    Headline("again", "at strength 1.5", "stronger"),
    Headline("again", "on a base in NF4", "nf4"),
)
"""All of them, run or not: the intervals are corrected for their number, and it must not depend on what came out."""


def chosen_point(points: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The checkpoint with the lowest loss on the search icons."""
    return min(points, key=lambda point: point["search"])


def chosen_cells(rows: Sequence[Row], count: int) -> list[str]:
    """The `count` cells of the map that get more seeds, best first, then the paper's if it is not among them.

    Best is the lowest mean loss on the search icons at the end.
    """
    losses: dict[str, list[float]] = {}
    for row in rows:
        if row["arm"] != "lora":
            losses.setdefault(row["arm"], []).append(row["points"][-1]["search"])
    best = sorted(losses, key=lambda arm: statistics.fmean(losses[arm]))
    others = [arm for arm in best if arm != PAPER]
    return [arm for arm in best if arm == PAPER or arm in others[: count - 1]]


def compared(rows: Sequence[Row], pairs: Pairs, base: Mapping[str, float], label: str = "") -> list[Result]:
    """Each pair's differences in every metric that both have, over the seeds that both have."""
    found = {(row["arm"], row["seed"]): row for row in rows}
    results = []
    for arm, against in pairs.items():
        seeds = sorted(seed for key, seed in found if key == arm and (against, seed) in found)
        both = [(found[arm, seed], found[against, seed]) for seed in seeds]
        result: Result = {"arm": arm, "against": against, "label": label, "seeds": seeds, "alike": alike(both)}
        for metric in METRICS:
            values = [_values(one, other, metric, base) for one, other in both]
            if values and None not in values:
                result[metric] = difference([value for value in values if value is not None])
        results.append(result)
    return results


def difference(pairs: Sequence[tuple[float, float]]) -> Result:
    """The paired difference of the first of each less the second."""
    found = paired_difference([one for one, _ in pairs], [other for _, other in pairs])
    return {**asdict(found), "differences": list(found.differences), "n": found.n}


def alike(both: Sequence[tuple[Row, Row]]) -> int:
    """How many pairs saw the same images, crops, noise and timesteps in every step."""
    return sum(one["draws"] == other["draws"] for one, other in both)


def corrected(found: Mapping[str, Any]) -> Result:
    """A paired difference with the interval of Bonferroni's correction for all headline comparisons."""
    zeros = [0.0] * len(found["differences"])
    wider = paired_difference(found["differences"], zeros, 1 - (1 - CONFIDENCE) / len(HEADLINES))
    return {**found, "low": wider.low, "high": wider.high}


def headline_rows(results: Mapping[str, Result]) -> list[Result]:
    """The headline comparisons that have been run, corrected."""
    rows = []
    for part, name, metric in HEADLINES:
        result = results.get(part)
        if result is None:
            continue
        arm, against = result["headlines"][name]
        pair: Result = next((one for one in result["pairs"] if (one["arm"], one["against"]) == (arm, against)), {})
        if metric in pair:
            shared = {"part": part, "name": name, "metric": metric, "arm": arm, "against": against}
            rows.append({**shared, **corrected(pair[metric])})
    return rows


def _values(one: Row, other: Row, metric: str, base: Mapping[str, float]) -> tuple[float, float] | None:
    if metric == "equal_loss":
        if not ("points" in one and "points" in other):
            return None
        return at_equal_loss(_walk(one, base), _walk(other, base))
    return (one[metric], other[metric]) if metric in one and metric in other else None


def _walk(row: Row, base: Mapping[str, float]) -> list[TrajectoryPoint]:
    """The run from the base on; what is held out are the reported icons."""
    start = TrajectoryPoint(0, 0.0, base["train"], base["report"])
    points = (TrajectoryPoint(at["step"], at["seconds"], at["train"], at["report"]) for at in row["points"])
    return [start, *points]
