"""Prepares a comparison's headline, numbers and paired differences for its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatlora_diffusion.charts.rows import Dot, Limits, axis_row, dot_row, row_limits
from flatlora_diffusion.compare.page.format import (
    BETTER,
    Named,
    Number,
    Pair,
    Result,
    Section,
    arm_name,
    difference_name,
    headline,
    look_of,
    main_arms,
    mean_with_spread,
    metric_of,
    pairs_of,
    values_of,
)
from flatlora_diffusion.evaluation.paired_statistics import CLEAN_LOSS, ENDS, SECONDS, STEPS
from flatlora_diffusion.storage.formatting import MISSING, count_text, figure, interval, is_known

_MATCHED = {
    STEPS: "equal steps",
    ENDS: "the end of each run",
    CLEAN_LOSS: "equal unperturbed loss",
    SECONDS: "equal training time",
}


def verdict_chart(result: Result) -> Mapping[str, Any] | None:
    """The chart of the verdict: a paired difference with its interval; None unless two arms were compared."""
    pair = headline(result)
    if pair is None:
        return None
    metric, limits = metric_of(result, pair["metric"]), _limits([pair])
    sample = "of one seed" if pair["n"] == 1 else "with each seed"
    sample += f" on {pair['images']} images" if pair.get("images") else ""
    bounds = interval(pair["low"], pair["high"], metric["digits"]) or f"{sample}, so without an interval"
    return {
        "title": f"{metric['name']}, {difference_name(result, pair)}",
        "mean": f"{figure(pair['mean'], metric['digits'], signed=True)} {bounds}",
        "chart": _row(result, pair, limits),
        **_axis(result, pair, limits),
    }


def numbers(result: Result) -> Section:
    """A row per metric: the base, each arm, and the difference of the headline's arms."""
    arms, first = main_arms(result), headline(result)
    columns = ["Base", *(arm_name(result, arm) for arm in arms)]
    if first is not None:
        columns.append(difference_name(result, first))
    rows = []
    for metric in result["metrics"]:
        key, digits = metric["key"], metric["digits"]
        base, values = result["base"].get(key), {arm: values_of(result["values"].get(arm, {}), key) for arm in arms}
        if not is_known(base) and not any(values.values()):
            continue
        cells = [Number(figure(base, digits)), *(mean_with_spread(values[arm], digits) for arm in arms)]
        if first is not None:
            cells.append(_difference_cell(result, key, first))
        rows.append({"metric": _metric_label(metric), "cells": cells})
    seeds = len(result["seeds"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "of one seed, so without a spread"
    text = f"At the end of the run, strength 1; {spread}. Differences are paired by seed, with 95 % intervals."
    content = {"columns": columns, "rows": rows, "by_seed": _all_values(result)} if rows else None
    return Section("numbers", "Numbers", text, "numbers", content)


def paired(result: Result) -> Section:
    """Every paired difference with its chart, grouped by arms and metric; groups with controls are folded."""
    arms, groups = main_arms(result), dict[tuple[str, str], list[Pair]]()
    for metric in result["metrics"]:
        for pair in pairs_of(result, metric["key"]):
            groups.setdefault((pair["arm"], pair["against"]), []).append(pair)
    rows = [
        {
            "title": difference_name(result, pairs[0]),
            "is_folded": arm not in arms or against not in arms,
            "metrics": _by_metric(result, pairs),
        }
        for (arm, against), pairs in groups.items()
    ]
    rows.sort(key=lambda group: bool(group["is_folded"]))
    intervals = sum(is_known(pair["low"]) for pairs in groups.values() for pair in pairs)
    text = (
        "A small dot is the difference between two otherwise equal runs of one seed. The large mark is the mean over "
        "seeds, the bar its 95 % interval: for a loss over seeds and images, for other metrics over seeds alone. "
        "An interval that contains 0 shows no difference."
    )
    if intervals:
        text += (
            f" Of {intervals} such intervals about {intervals / 20:.2g} would exclude 0 by chance alone."
            " The detectable difference is the smallest one that this many seeds show with 80 % power."
        )
    return Section("differences", "Paired differences", text, "differences", {"groups": rows} if rows else None)


def _by_metric(result: Result, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The pairs of each metric, drawn on the same scale."""
    by_metric = []
    for key in dict.fromkeys(pair["metric"] for pair in pairs):
        of_metric = [pair for pair in pairs if pair["metric"] == key]
        metric, limits = metric_of(result, key), _limits(of_metric)
        rows = [
            {
                "matched": _MATCHED.get(pair["matched"], pair["matched"]),
                "chart": _row(result, pair, limits),
                "difference": Number(
                    figure(pair["mean"], metric["digits"], signed=True),
                    (interval(pair["low"], pair["high"], metric["digits"]) or MISSING,),
                ),
                "conclusion": _conclusion(result, pair),
                "power": _power(pair, metric["digits"]),
            }
            for pair in of_metric
        ]
        by_metric.append({"metric": _metric_label(metric), "rows": rows, **_axis(result, of_metric[0], limits)})
    return by_metric


def _row(result: Result, pair: Pair, limits: Limits) -> str:
    """The chart of a paired difference: its mean, its interval and each seed."""
    digits, look = metric_of(result, pair["metric"])["digits"], look_of(result, pair["arm"])
    words = f"{figure(pair['mean'], digits, signed=True)} {interval(pair['low'], pair['high'], digits)}".strip()
    seeds = result["seeds"] if len(result["seeds"]) == len(pair["differences"]) else None
    dots = [Dot(pair["mean"], look, f"mean {words}")]
    for index, difference in enumerate(pair["differences"]):
        if is_known(difference):
            name = f"seed {seeds[index]}" if seeds else f"pair {index + 1}"
            dots.append(Dot(difference, look, f"{name}: {figure(difference, digits, signed=True)}", is_seed=True))
    bar = (pair["low"], pair["high"]) if is_known(pair["low"]) and is_known(pair["high"]) else None
    return dot_row(limits, dots, bar, zero=True).svg("row", f"mean difference {words}")


def _limits(pairs: Sequence[Pair]) -> Limits:
    """A common scale, which includes 0, for the charts of several pairs."""
    values = [value for pair in pairs for value in (*pair["differences"], pair["mean"], pair["low"], pair["high"])]
    return row_limits([0.0, *(value for value in values if is_known(value))])


def _axis(result: Result, pair: Pair, limits: Limits) -> dict[str, Any]:
    """The axis below the rows, and the labels left and right of zero."""
    better = metric_of(result, pair["metric"])["better"]
    arm, against = arm_name(result, pair["arm"]), arm_name(result, pair["against"])
    sides = {
        "lower": (f"{arm} better", f"{against} better"),
        "higher": (f"{against} better", f"{arm} better"),
    }.get(better, (f"lower with {arm}", f"higher with {arm}"))
    return {"axis": axis_row(limits).svg("ticks", ""), "sides": sides}


def _conclusion(result: Result, pair: Pair) -> str:
    low, high = pair["low"], pair["high"]
    if not (is_known(low) and is_known(high)):
        return f"{'one seed' if pair['n'] == 1 else 'all seeds equal'}: no interval"
    if low == high == 0:
        return "exactly equal"
    if low <= 0 <= high:
        return "no difference found"
    better = metric_of(result, pair["metric"])["better"]
    if better is None:
        return f"{'lower' if high < 0 else 'higher'} with {arm_name(result, pair['arm'])}"
    is_better = (high < 0) == (better == "lower")
    return f"{arm_name(result, pair['arm' if is_better else 'against'])} better"


def _power(pair: Pair, digits: int) -> str:
    sample = count_text(pair["n"], "seed")
    sample += f", {pair['images']} images" if pair.get("images") else ""
    has_power = is_known(pair["detectable"]) and pair["detectable"]
    return f"{sample}; detectable: {figure(pair['detectable'], digits)}" if has_power else sample


def _metric_label(metric: Mapping[str, Any]) -> Named:
    parts = (BETTER.get(metric["better"]), metric["help"].rstrip("."))
    return Named(metric["name"], ". ".join(part for part in parts if part))


def _difference_cell(result: Result, metric: str, first: Pair) -> Number:
    for pair in pairs_of(result, metric):
        if all(pair[part] == first[part] for part in ("arm", "against", "matched")):
            digits = metric_of(result, metric)["digits"]
            notes = (interval(pair["low"], pair["high"], digits), _conclusion(result, pair))
            return Number(figure(pair["mean"], digits, signed=True), tuple(note for note in notes if note))
    return Number("")


def _all_values(result: Result) -> Mapping[str, Any] | None:
    """The values of every arm, controls included, and seed; None if nothing was measured."""
    measured = [by_seed for by_seed in result["values"].values() if by_seed]
    metrics = [m for m in result["metrics"] if any(values_of(by_seed, m["key"]) for by_seed in measured)]
    rows = [
        [arm_name(result, arm), seed, *(figure(figures.get(m["key"]), m["digits"]) for m in metrics)]
        for arm, by_seed in result["values"].items()
        for seed, figures in by_seed.items()
    ]
    return {"columns": ["arm", "seed", *(m["name"] for m in metrics)], "rows": rows} if rows else None
