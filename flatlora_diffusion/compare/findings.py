"""Computes the findings of a comparison: paired differences, the verdict from them, and the table of means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flatlora_diffusion.compare.arms import Arm
from flatlora_diffusion.compare.evaluator import MetricValues
from flatlora_diffusion.compare.trajectory import TrajectoryPoint, losses_at_equal_loss, losses_at_equal_seconds
from flatlora_diffusion.evaluation.crossed_statistics import FEWEST_IMAGES, crossed_difference
from flatlora_diffusion.evaluation.paired_statistics import (
    CLEAN_LOSS,
    ENDS,
    SECONDS,
    STEPS,
    detectable,
    paired_difference,
)
from flatlora_diffusion.storage.formatting import MINUS, count_text, figure

HELDOUT_LOSS = "heldout_loss"

Values = Mapping[str, Mapping[int, MetricValues]]
"""Metrics by arm and seed."""
ImageLosses = Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]]
"""The losses of each image at a run's end, by arm, seed and metric."""
Trajectories = Mapping[str, Mapping[int, Sequence[TrajectoryPoint]]]


def paired_rows(
    arms: Sequence[Arm], metrics: Sequence[str], values: Values, images: ImageLosses, trajectories: Trajectories
) -> list[dict[str, Any]]:
    """Compare each arm with the first, paired by seed.

    Every metric is compared at equal steps, the held-out loss also at equal unperturbed loss and equal training time.
    The interval of a loss at equal steps is over seeds and images, that of any other metric over seeds alone. If an
    arm sets its own number of steps, the runs' ends are compared.
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
                row = _difference_row(metric, arm.key, reference, end, pairs)
                rows.append({**row, **_image_interval(images, metric, arm.key, reference, seeds)})
        pairs_of_runs = [
            (trajectories[arm.key][seed], trajectories[reference][seed])
            for seed in seeds
            if seed in trajectories.get(arm.key, {}) and seed in trajectories.get(reference, {})
        ]
        if pairs_of_runs:
            at_loss = [losses_at_equal_loss(*pair) for pair in pairs_of_runs]
            at_time = [losses_at_equal_seconds(*pair) for pair in pairs_of_runs]
            rows.append(_difference_row(HELDOUT_LOSS, arm.key, reference, CLEAN_LOSS, at_loss))
            rows.append(_difference_row(HELDOUT_LOSS, arm.key, reference, SECONDS, at_time))
    return rows


def verdict(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """State whether the held-out losses of the first two arms differ, and for which population the statement holds."""
    row = next((row for row in rows if row["metric"] == HELDOUT_LOSS and row["matched"] in (STEPS, ENDS)), None)
    if row is None:
        return "Only one arm was trained: there is nothing to compare it with."
    arm, against = names[row["arm"]], names[row["against"]]
    digits = _digits(row)
    difference = f"{arm} {MINUS} {against} in held-out loss: {figure(row['mean'], digits, signed=True)}"
    if row["low"] is None:
        return f"{_sample_text(row)} cannot tell: {difference}, without an interval; {_advice(row)}."
    margin = figure((row["high"] - row["low"]) / 2, digits)
    has_one_seed = row["n"] == 1
    scope = "this training, over" if has_one_seed else "another training and other images like these, from"
    sample = count_text(row["images"], "image") if has_one_seed else _sample_text(row)
    estimate = f"{difference} ± {margin} for {scope} {sample}"
    if row["low"] <= 0 <= row["high"]:
        power = f"; a difference of {figure(row['detectable'], digits)} would have been detected with 80 % power"
        return f"No difference found: {estimate}{power}.{_source_shares(row)}"
    better = arm if row["high"] < 0 else against
    where = " in this training" if has_one_seed else ""
    advice = f"; {_advice(row)}" if has_one_seed else ""
    return f"{better} predicts unseen images better{where}: {estimate}{advice}.{_source_shares(row)}"


def _sample_text(row: Mapping[str, Any]) -> str:
    """`3 seeds and 64 images`."""
    seeds = "One seed" if row["n"] == 1 else count_text(row["n"], "seed")
    return f"{seeds} and {count_text(row['images'], 'image')}" if row.get("images") else seeds


def _advice(row: Mapping[str, Any]) -> str:
    """Name the settings that would give an interval, or one that covers other trainings."""
    if row["n"] == 1 and row["low"] is not None:
        return "--num_seeds 5 would include other trainings"
    images = f" or {FEWEST_IMAGES} held-out images or more" if (row.get("images") or 0) < FEWEST_IMAGES else ""
    return f"--num_seeds {5 if row['n'] == 1 else 2 * row['n']}{images} would give an interval"


def _source_shares(row: Mapping[str, Any]) -> str:
    """The shares of the uncertainty due to seeds and to images; empty unless both vary."""
    seeds, images = row.get("seed_share"), row.get("image_share")
    if row["n"] == 1 or seeds is None or images is None:
        return ""
    return f" Of this uncertainty {seeds:.0%} comes from the seeds and {images:.0%} from the images."


def _digits(row: Mapping[str, Any]) -> int:
    """The number of decimals that shows two digits of the interval's width, or of the difference."""
    width = abs(row["mean"]) if row["low"] is None else row["high"] - row["low"]
    return max(4, 1 - math.floor(math.log10(width))) if width else 4


def metrics_table(
    names: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    base: MetricValues,
    values: Mapping[str, Mapping[Any, MetricValues]],
) -> str:
    """Format the means over seeds as a Markdown table with a row for each metric."""
    lines = ["| | Base | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 2) + "|"]
    for metric in metrics:
        key, digits = metric["key"], metric["digits"]
        cells = [f"{base[key]:.{digits}f}" if key in base else ""]
        for arm in names:
            of_seeds = [of_run[key] for of_run in values[arm].values() if key in of_run]
            cells.append(f"{sum(of_seeds) / len(of_seeds):.{digits}f}" if of_seeds else "")
        lines.append(f"| {metric['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _image_interval(images: ImageLosses, metric: str, arm: str, against: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The interval over seeds and images of a metric that is measured for each image; empty for any other metric."""
    pairs = [
        (images[arm][seed][metric], images[against][seed][metric])
        for seed in seeds
        if metric in images.get(arm, {}).get(seed, {}) and metric in images.get(against, {}).get(seed, {})
    ]
    if not pairs:
        return {}
    difference = crossed_difference([[value - base for value, base in zip(*pair, strict=True)] for pair in pairs])
    has_spread = difference.error is not None and difference.freedom is not None
    power = detectable(difference.error, difference.freedom) if difference.error and difference.freedom else 0.0
    return {
        "low": difference.low,
        "high": difference.high,
        "detectable": power if has_spread else None,
        "images": difference.images,
        "seed_share": difference.seed_share,
        "image_share": difference.image_share,
    }


def _difference_row(
    metric: str, arm: str, against: str, matched: str, pairs: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    difference = paired_difference([value for value, _ in pairs], [reference for _, reference in pairs])
    key = {"metric": metric, "arm": arm, "against": against, "matched": matched}
    return {**key, **asdict(difference), "differences": list(difference.differences), "n": difference.n}
