"""How arms do over the run, at other strengths and by concept group, as sections of a comparison's page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flatlora_diffusion.page_charts import Dot, Scale, Series, axis_row, dot_row, line_chart
from flatlora_diffusion.page_text import (
    MINUS,
    Result,
    Section,
    arm_name,
    charted_axis,
    charted_row,
    charted_table,
    chip,
    escaped,
    figure,
    headline,
    is_known,
    look_of,
    main_arms,
    mean_of,
    metric_of,
)

Runs = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # by arm and seed
Curve = Mapping[Any, tuple[float, float]]  # (x, y) by step
_X_LABELS = {
    "step": "step",
    "seconds": "seconds of training",
    "clean_train_loss": "← clean training loss, falling over the run",
}
_BETTER = {"lower": ", lower is better", "higher": ", higher is better"}


def trajectories(result: Result) -> Section:
    """Charts over the run: held-out loss by steps, seconds and clean training loss, its difference, and the rest."""
    found = {arm: result["trajectories"].get(arm, {}) for arm in main_arms(result)}
    runs = {arm: by_seed for arm, by_seed in found.items() if any(len(points) > 1 for points in by_seed.values())}
    keys = dict.fromkeys(
        key for by_seed in runs.values() for run in by_seed.values() for point in run for key in point
    )
    charts = [_run_chart(result, runs, "heldout_loss", "step"), _difference_chart(result, runs)]
    charts += [_run_chart(result, runs, "heldout_loss", x) for x in ("clean_train_loss", "seconds")]
    charts += [_run_chart(result, runs, key, "step") for key in keys if key not in ("step", "seconds", "heldout_loss")]
    text = "Measured at each checkpoint. Thin lines are single seeds, thick ones their mean."
    return Section("trajectories", "Over the run", text, _charts(result, list(runs), charts))


def strengths(result: Result) -> Section:
    """A chart per metric of what the arms do at other strengths of the LoRA."""
    swept = {arm: result["strengths"][arm] for arm in main_arms(result) if result["strengths"].get(arm)}
    charts = []
    for metric in result["metrics"]:
        lines = []
        for arm, by_strength in swept.items():
            points = [(float(at), figures.get(metric["key"])) for at, figures in by_strength.items()]
            known = sorted((at, value) for at, value in points if is_known(value))
            if len(known) > 1:
                lines.append(Series(arm_name(result, arm), look_of(result, arm), known))
        charts.append(_chart(result, lines, metric["key"], "strength of the LoRA"))
    text = "The trained LoRA applied more weakly or more strongly than it was trained, which is 1."
    return Section("strengths", "By strength", text, _charts(result, list(swept), charts))


def groups(result: Result) -> Section:
    """A row of dots per concept group: held-out loss of the base and the arms."""
    arms, first = main_arms(result), headline(result)
    columns = ["concepts", "", "Base", *(arm_name(result, arm) for arm in arms)]
    if first is not None:
        columns.append(f"{arm_name(result, first['arm'])} {MINUS} {arm_name(result, first['against'])}")
    rows = {name: _group_dots(result, group) for name, group in result["groups"].items()}
    rows = {name: dots for name, dots in rows.items() if dots}
    text = "Held-out loss on groups of concepts; small dots are seeds."
    if not rows:
        return Section("concepts", "By concept group", text, "")
    scale = Scale(dot.value for dots in rows.values() for dot in dots)
    charted = [
        charted_row(
            columns,
            [
                escaped(name),
                dot_row(scale, dots, None, zero=False, label=f"held-out loss, {name}"),
                *_group_cells(result, result["groups"][name]),
            ],
        )
        for name, dots in rows.items()
    ]
    body = f'<tbody class="rows">{"".join(charted)}{charted_axis(columns, axis_row(scale))}</tbody>'
    chips = "".join(chip(result, arm) for arm in ("base", *arms))
    table = charted_table(columns, [body])
    return Section("concepts", "By concept group", text, f'<p class="chips">{chips}</p>{table}')


def _group_dots(result: Result, group: Mapping[str, Any]) -> list[Dot]:
    digits = metric_of(result, "heldout_loss")["digits"]
    dots = [Dot(group["base"], "base", f"Base: {figure(group['base'], digits)}")] if is_known(group["base"]) else []
    for arm in main_arms(result):
        known, look = _known(group, arm), look_of(result, arm)
        mean = mean_of(list(known.values()))
        if mean is not None:
            dots.append(Dot(mean, look, f"{arm_name(result, arm)}: {figure(mean, digits)}"))
        if len(known) > 1:
            dots += [Dot(v, look, f"seed {seed}: {figure(v, digits)}", small=True) for seed, v in known.items()]
    return dots


def _group_cells(result: Result, group: Mapping[str, Any]) -> list[str]:
    digits, first = metric_of(result, "heldout_loss")["digits"], headline(result)
    means = [mean_of(list(_known(group, arm).values())) for arm in main_arms(result)]
    cells = [figure(value, digits) for value in (group["base"], *means)]
    if first is not None:
        ours, theirs = _known(group, first["arm"]), _known(group, first["against"])
        cells.append(figure(mean_of([ours[seed] - theirs[seed] for seed in ours if seed in theirs]), digits, True))
    return cells


def _known(group: Mapping[str, Any], arm: str) -> dict[str, float]:
    return {seed: value for seed, value in group["values"].get(arm, {}).items() if is_known(value)}


def _run_chart(result: Result, runs: Runs, key: str, x: str) -> str:
    """What is measured as `key` at each checkpoint, over the runs' `x`."""
    lines: list[Series] = []
    for arm, by_seed in runs.items():
        curves = [_curve(points, key, x) for points in by_seed.values()]
        lines += _seeds_and_mean(arm_name(result, arm), look_of(result, arm), curves)
    return _chart(result, lines, key, _X_LABELS[x])


def _difference_chart(result: Result, runs: Runs) -> str:
    """The headline's difference of held-out loss at each checkpoint."""
    first = headline(result)
    if first is None or not {first["arm"], first["against"]} <= runs.keys():
        return ""
    curves = []
    for seed, points in runs[first["arm"]].items():
        ours = _curve(points, "heldout_loss", "step")
        theirs = _curve(runs[first["against"]].get(seed, ()), "heldout_loss", "step")
        curves.append({step: (x, y - theirs[step][1]) for step, (x, y) in ours.items() if step in theirs})
    name = f"{arm_name(result, first['arm'])} {MINUS} {arm_name(result, first['against'])}"
    lines = list(_seeds_and_mean(name, look_of(result, first["arm"]), curves))
    metric = metric_of(result, "heldout_loss")["name"]
    return line_chart(lines, f"{metric}, {name}", "step", zero="no difference") if lines else ""


def _curve(points: Sequence[Mapping[str, Any]], key: str, x: str) -> Curve:
    known = [point for point in points if all(is_known(point.get(part)) for part in ("step", x, key))]
    return {point["step"]: (point[x], point[key]) for point in known}


def _seeds_and_mean(name: str, look: str, curves: Sequence[Curve]) -> Iterator[Series]:
    """Each seed's line, and their mean at the steps that all of them have; nothing that is one point only."""
    drawn = [curve for curve in curves if len(curve) > 1]
    if len(drawn) > 1:
        yield from (Series(name, look, list(curve.values()), thin=True) for curve in drawn)
    shared = [step for step in drawn[0] if all(step in curve for curve in drawn)] if drawn else []
    if len(shared) > 1:
        places = [[curve[step] for curve in drawn] for step in shared]
        means = [tuple(map(statistics.fmean, zip(*seeds, strict=True))) for seeds in places]
        yield Series(name, look, [(x, y) for x, y in means])


def _chart(result: Result, lines: Sequence[Series], key: str, x_label: str) -> str:
    """The lines and the base's value as a level one."""
    if not lines:
        return ""
    metric, base = metric_of(result, key), result["base"].get(key)
    xs = [x for line in lines for x, _ in line.points]
    level = [Series("Base", "base", [(min(xs), base), (max(xs), base)])] if is_known(base) else []
    return line_chart([*level, *lines], f"{metric['name']}{_BETTER.get(metric['better'], '')}", x_label)


def _charts(result: Result, arms: Sequence[str], charts: Sequence[str]) -> str:
    body = "".join(charts)
    chips = "".join(chip(result, arm) for arm in ("base", *arms))
    return f'<p class="chips">{chips}</p><div class="charts">{body}</div>' if body else ""
