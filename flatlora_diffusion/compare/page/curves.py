"""Prepares a comparison's charts over the run, by strength and by concept group for its page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flatlora_diffusion.charts.lines import Line, line_chart
from flatlora_diffusion.charts.palette import Look
from flatlora_diffusion.charts.rows import Dot, axis_row, dot_row, row_limits
from flatlora_diffusion.compare.page.format import (
    BETTER,
    Chip,
    Result,
    Section,
    arm_name,
    chip,
    difference_name,
    headline,
    look_of,
    main_arms,
    mean_of,
    metric_of,
)
from flatlora_diffusion.storage.formatting import figure, is_known

Runs = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # by arm and seed
TitledChart = Mapping[str, str] | None
Curve = Mapping[Any, tuple[float, float]]  # (x, y) by step
_X_LABELS = {
    "step": "step",
    "seconds": "seconds of training",
    "clean_train_loss": "← unperturbed training loss, decreasing over the run",
}


def trajectories(result: Result) -> Section:
    """Charts of the metrics at each checkpoint, and of held-out loss by training time and by unperturbed loss."""
    by_arm = {arm: result["trajectories"].get(arm, {}) for arm in main_arms(result)}
    runs = {arm: by_seed for arm, by_seed in by_arm.items() if any(len(points) > 1 for points in by_seed.values())}
    keys = dict.fromkeys(
        key for by_seed in runs.values() for run in by_seed.values() for point in run for key in point
    )
    charts = [_run_chart(result, runs, "heldout_loss", "step"), _difference_chart(result, runs)]
    charts += [_run_chart(result, runs, "heldout_loss", x) for x in ("clean_train_loss", "seconds")]
    charts += [_run_chart(result, runs, key, "step") for key in keys if key not in ("step", "seconds", "heldout_loss")]
    text = "Measured at each checkpoint. Thin lines are single seeds, thick lines their mean."
    return Section("trajectories", "Over the run", text, "curves", _curves_content(result, list(runs), charts))


def strengths(result: Result) -> Section:
    """A chart per metric over the strength of the LoRA."""
    measured = {arm: result["strengths"][arm] for arm in main_arms(result) if result["strengths"].get(arm)}
    charts = []
    for metric in result["metrics"]:
        lines = []
        for arm, by_strength in measured.items():
            points = ((float(strength), figures.get(metric["key"])) for strength, figures in by_strength.items())
            known = sorted((strength, value) for strength, value in points if is_known(value))
            if len(known) > 1:
                xs, ys = zip(*known, strict=True)
                lines.append(Line(arm_name(result, arm), look_of(result, arm), xs, ys))
        charts.append(_chart(result, lines, metric["key"], "strength of the LoRA"))
    text = "The LoRA applied at other strengths than 1, with which it was trained."
    return Section("strengths", "By strength", text, "curves", _curves_content(result, list(measured), charts))


def groups(result: Result) -> Section:
    """A row per concept group with the held-out loss of the base and of the arms."""
    arms, first = main_arms(result), headline(result)
    columns = ["Base", *(arm_name(result, arm) for arm in arms)]
    if first is not None:
        columns.append(difference_name(result, first))
    dots = {name: _group_dots(result, group) for name, group in result["groups"].items()}
    dots = {name: of_group for name, of_group in dots.items() if of_group}
    text = "Held-out loss on groups of concepts; small dots are seeds."
    if not dots:
        return Section("concepts", "By concept group", text, "concepts", None)
    limits = row_limits(dot.value for of_group in dots.values() for dot in of_group)
    rows = [
        {
            "name": name,
            "chart": dot_row(limits, of_group, None, zero=False).svg("row", f"held-out loss, {name}"),
            "cells": _group_cells(result, result["groups"][name]),
        }
        for name, of_group in dots.items()
    ]
    content = {
        "columns": columns,
        "rows": rows,
        "axis": axis_row(limits).svg("ticks", ""),
        "chips": _chips(result, arms),
    }
    return Section("concepts", "By concept group", text, "concepts", content)


def _group_dots(result: Result, group: Mapping[str, Any]) -> list[Dot]:
    digits = metric_of(result, "heldout_loss")["digits"]
    dots = []
    if is_known(group["base"]):
        dots.append(Dot(group["base"], look_of(result, "base"), f"Base: {figure(group['base'], digits)}"))
    for arm in main_arms(result):
        known, look = _known_values(group, arm), look_of(result, arm)
        mean = mean_of(list(known.values()))
        if mean is not None:
            dots.append(Dot(mean, look, f"{arm_name(result, arm)}: {figure(mean, digits)}"))
        if len(known) > 1:
            dots += [Dot(v, look, f"seed {seed}: {figure(v, digits)}", is_seed=True) for seed, v in known.items()]
    return dots


def _group_cells(result: Result, group: Mapping[str, Any]) -> list[str]:
    digits, first = metric_of(result, "heldout_loss")["digits"], headline(result)
    means = [mean_of(list(_known_values(group, arm).values())) for arm in main_arms(result)]
    cells = [figure(value, digits) for value in (group["base"], *means)]
    if first is not None:
        values, reference = _known_values(group, first["arm"]), _known_values(group, first["against"])
        differences = [value - reference[seed] for seed, value in values.items() if seed in reference]
        cells.append(figure(mean_of(differences), digits, True))
    return cells


def _known_values(group: Mapping[str, Any], arm: str) -> dict[str, float]:
    return {seed: value for seed, value in group["values"].get(arm, {}).items() if is_known(value)}


def _run_chart(result: Result, runs: Runs, key: str, x: str) -> TitledChart:
    lines: list[Line] = []
    for arm, by_seed in runs.items():
        curves = [_curve(points, key, x) for points in by_seed.values()]
        lines += _seeds_and_mean(arm_name(result, arm), look_of(result, arm), curves)
    return _chart(result, lines, key, _X_LABELS[x])


def _difference_chart(result: Result, runs: Runs) -> TitledChart:
    first = headline(result)
    if first is None or not {first["arm"], first["against"]} <= runs.keys():
        return None
    curves = []
    for seed, points in runs[first["arm"]].items():
        curve = _curve(points, "heldout_loss", "step")
        reference = _curve(runs[first["against"]].get(seed, ()), "heldout_loss", "step")
        curves.append({step: (x, y - reference[step][1]) for step, (x, y) in curve.items() if step in reference})
    name = difference_name(result, first)
    lines = list(_seeds_and_mean(name, look_of(result, first["arm"]), curves))
    title = f"{metric_of(result, 'heldout_loss')['name']}, {name}"
    return _titled_chart(title, lines, "step", zero="no difference") if lines else None


def _curve(points: Sequence[Mapping[str, Any]], key: str, x: str) -> Curve:
    known = [point for point in points if all(is_known(point.get(part)) for part in ("step", x, key))]
    return {point["step"]: (point[x], point[key]) for point in known}


def _seeds_and_mean(name: str, look: Look, curves: Sequence[Curve]) -> Iterator[Line]:
    """The line of each seed, and their mean at the common steps; single points are omitted."""
    lines = [curve for curve in curves if len(curve) > 1]
    for curve in lines if len(lines) > 1 else ():
        xs, ys = zip(*curve.values(), strict=True)
        yield Line(name, look, xs, ys, is_seed=True)
    shared = [step for step in lines[0] if all(step in curve for curve in lines)] if lines else []
    if len(shared) > 1:
        mean_x, mean_y = (
            [statistics.fmean(curve[step][part] for curve in lines) for step in shared] for part in (0, 1)
        )
        yield Line(name, look, mean_x, mean_y)


def _chart(result: Result, lines: Sequence[Line], key: str, x_label: str) -> TitledChart:
    """The chart of the lines, with the base's value as a horizontal line."""
    if not lines:
        return None
    metric, base = metric_of(result, key), result["base"].get(key)
    xs = [x for line in lines for x in line.xs]
    level = [Line("Base", look_of(result, "base"), (min(xs), max(xs)), (base, base))] if is_known(base) else []
    title = ", ".join(filter(None, (metric["name"], BETTER.get(metric["better"]))))
    return _titled_chart(title, [*level, *lines], x_label)


def _titled_chart(title: str, lines: Sequence[Line], x_label: str, zero: str = "") -> TitledChart:
    chart = line_chart(lines, x_label, zero).svg("chart", f"{title} against {x_label}")
    return {"title": title, "chart": chart}


def _curves_content(result: Result, arms: Sequence[str], charts: Sequence[TitledChart]) -> dict[str, Any] | None:
    existing = [chart for chart in charts if chart is not None]
    return {"chips": _chips(result, arms), "charts": existing} if existing else None


def _chips(result: Result, arms: Sequence[str]) -> list[Chip]:
    return [chip(result, arm) for arm in ("base", *arms)]
