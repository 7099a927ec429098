"""The findings of a comparison: paired differences, the verdict from them alone, and the table of means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flatlora_diffusion.compare.arms import Arm
from flatlora_diffusion.compare.evaluator import MetricValues
from flatlora_diffusion.compare.paired import CLEAN_LOSS, ENDS, SECONDS, STEPS, paired_difference
from flatlora_diffusion.compare.trajectory import TrajectoryPoint, at_equal_loss, at_equal_seconds
from flatlora_diffusion.ground.numbers import figure

HELDOUT_LOSS = "heldout_loss"

Values = Mapping[str, Mapping[int, MetricValues]]
"""MetricValues by arm and seed."""
Trajectories = Mapping[str, Mapping[int, Sequence[TrajectoryPoint]]]


def paired_rows(
    arms: Sequence[Arm], metrics: Sequence[str], values: Values, trajectories: Trajectories
) -> list[dict[str, Any]]:
    """Each arm against the first one, seed by seed: every metric at equal steps, the held-out loss otherwise too.

    Where an arm has steps of its own, the runs' ends are compared.
    """
    reference = arms[0].key
    rows = []
    for arm in arms[1:]:
        seeds = [seed for seed in values[arm.key] if seed in values[reference]]
        end = ENDS if "max_train_steps" in {*arm.changes, *arms[0].changes} else STEPS
        for metric in metrics:
            pairs = [
                (values[arm.key][seed][metric], values[reference][seed][metric])
                for seed in seeds
                if metric in values[arm.key][seed] and metric in values[reference][seed]
            ]
            if pairs:
                rows.append(_difference_row(metric, arm.key, reference, end, pairs))
        pairs_of_runs = [
            (trajectories[arm.key][seed], trajectories[reference][seed])
            for seed in seeds
            if seed in trajectories.get(arm.key, {}) and seed in trajectories.get(reference, {})
        ]
        if pairs_of_runs:
            at_loss = [at_equal_loss(*pair) for pair in pairs_of_runs]
            at_time = [at_equal_seconds(*pair) for pair in pairs_of_runs]
            rows.append(_difference_row(HELDOUT_LOSS, arm.key, reference, CLEAN_LOSS, at_loss))
            rows.append(_difference_row(HELDOUT_LOSS, arm.key, reference, SECONDS, at_time))
    return rows


def verdict(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """One sentence from the paired difference of the held-out loss between the second arm and the first."""
    row = next((row for row in rows if row["metric"] == HELDOUT_LOSS and row["matched"] in (STEPS, ENDS)), None)
    if row is None:
        return "One arm alone was trained: there is nothing to compare it with."
    arm, against = names[row["arm"]], names[row["against"]]
    digits = _digits(row)
    mean = figure(row["mean"], digits, signed=True)
    if row["low"] is None:
        seeds, each, more = ("One seed", "", 5) if row["n"] == 1 else (f"{row['n']} seeds", " with each", 2 * row["n"])
        return (
            f"{seeds} cannot tell: {arm}'s held-out loss differs from {against}'s by {mean}{each}, and how "
            f"much that varies by chance is unknown; --num_seeds {more} gives an interval."
        )
    low, high = (figure(row[end], digits, signed=True) for end in ("low", "high"))
    interval = f"{mean} (95 % interval {low} to {high}, {row['n']} seeds)"
    if row["low"] <= 0 <= row["high"]:
        return (
            f"No difference found: {arm}'s held-out loss differs from {against}'s by {interval}; a difference of "
            f"{figure(row['detectable'], digits)} would have been found with 80 % power."
        )
    better = arm if row["high"] < 0 else against
    return (
        f"{better} predicts images it never saw better: {arm}'s held-out loss differs from {against}'s by {interval}."
    )


def _digits(row: Mapping[str, Any]) -> int:
    """Decimals that show two digits of the interval's width, or of the difference."""
    width = abs(row["mean"]) if row["low"] is None else row["high"] - row["low"]
    return max(4, 1 - math.floor(math.log10(width))) if width else 4


def metrics_table(
    names: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    base: MetricValues,
    values: Mapping[str, Mapping[Any, MetricValues]],
) -> str:
    """The means over seeds as a Markdown table: a row for each metric, a column for the base and for each arm."""
    lines = ["| | Base | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 2) + "|"]
    for metric in metrics:
        key, digits = metric["key"], metric["digits"]
        cells = [f"{base[key]:.{digits}f}" if key in base else ""]
        for arm in names:
            of_seeds = [of_run[key] for of_run in values[arm].values() if key in of_run]
            cells.append(f"{sum(of_seeds) / len(of_seeds):.{digits}f}" if of_seeds else "")
        lines.append(f"| {metric['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference_row(
    metric: str, arm: str, against: str, matched: str, pairs: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    difference = paired_difference([one for one, _ in pairs], [other for _, other in pairs])
    place = {"metric": metric, "arm": arm, "against": against, "matched": matched}
    return {**place, **asdict(difference), "differences": list(difference.differences), "n": difference.n}
