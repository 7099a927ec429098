"""What a comparison found, as sections of its page: the numbers and the paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatlora_diffusion.page_charts import Dot, Scale, axis_row, dot_row
from flatlora_diffusion.page_text import (
    MINUS,
    NOTHING,
    Pair,
    Result,
    Section,
    arm_name,
    charted_axis,
    charted_row,
    charted_table,
    details,
    escaped,
    figure,
    headline,
    interval,
    is_known,
    look_of,
    main_arms,
    mean_with_spread,
    metric_of,
    pairs_of,
    table,
    values_of,
)

_BETTER = {"lower": "lower is better", "higher": "higher is better"}
_MATCHED = {
    "steps": "equal steps",
    "ends": "the end of each",
    "clean loss": "equal clean loss",
    "seconds": "equal seconds",
}
_PAIR_COLUMNS = ("matched at", "", "difference, 95 % interval", "says")


def pair_row(result: Result, pair: Pair, scale: Scale) -> str:
    """The chart of one paired difference: its mean, its interval and each seed."""
    digits, look = metric_of(result, pair["metric"])["digits"], look_of(result, pair["arm"])
    words = f"{figure(pair['mean'], digits, signed=True)} {interval(pair['low'], pair['high'], digits)}".strip()
    seeds = result["seeds"] if len(result["seeds"]) == len(pair["differences"]) else None
    dots = [Dot(pair["mean"], look, f"mean {words}")]
    for place, difference in enumerate(pair["differences"]):
        if is_known(difference):
            name = f"seed {seeds[place]}" if seeds else f"pair {place + 1}"
            dots.append(Dot(difference, look, f"{name}: {figure(difference, digits, signed=True)}", small=True))
    bar = (pair["low"], pair["high"]) if interval(pair["low"], pair["high"], digits) else None
    return dot_row(scale, dots, bar, zero=True, label=f"mean difference {words}")


def pair_scale(pairs: Sequence[Pair]) -> Scale:
    """One scale with 0 for the charts of several pairs."""
    values = [value for pair in pairs for value in (*pair["differences"], pair["mean"], pair["low"], pair["high"])]
    return Scale([0.0, *(value for value in values if is_known(value))])


def pair_sides(result: Result, pair: Pair) -> str:
    """What lies left and right of zero, as HTML."""
    better = metric_of(result, pair["metric"])["better"]
    arm, against = (escaped(arm_name(result, pair[side])) for side in ("arm", "against"))
    sides = {
        "lower": (f"{arm} better", f"{against} better"),
        "higher": (f"{against} better", f"{arm} better"),
    }.get(better, (f"lower with {arm}", f"higher with {arm}"))
    return f'<div class="sides"><span>← {sides[0]}</span><span>{sides[1]} →</span></div>'


def pair_words(result: Result, pair: Pair) -> str:
    """What the interval says, not escaped."""
    low, high = pair["low"], pair["high"]
    if not (is_known(low) and is_known(high)):
        return "one seed: no interval" if pair["n"] == 1 else "no interval"
    if low == high == 0:
        return "exactly equal"
    if low <= 0 <= high:
        return "no difference found"
    better = metric_of(result, pair["metric"])["better"]
    if better is None:
        return f"{'lower' if high < 0 else 'higher'} with {arm_name(result, pair['arm'])}"
    won = (high < 0) == (better == "lower")
    return f"{arm_name(result, pair['arm' if won else 'against'])} better"


def numbers(result: Result) -> Section:
    """A row per metric: the base, each arm and the difference of the headline's arms at equal steps."""
    arms, first = main_arms(result), headline(result)
    columns = ["", "Base", *(arm_name(result, arm) for arm in arms)]
    if first is not None:
        columns.append(f"{arm_name(result, first['arm'])} {MINUS} {arm_name(result, first['against'])}")
    rows = []
    for metric in result["metrics"]:
        key, digits = metric["key"], metric["digits"]
        base, values = result["base"].get(key), {arm: values_of(result["values"].get(arm, {}), key) for arm in arms}
        if not is_known(base) and not any(values.values()):
            continue
        row = [_metric_title(metric), figure(base, digits)]
        row += [mean_with_spread(values[arm], digits) for arm in arms]
        if first is not None:
            row.append(_difference(result, key, first))
        rows.append(row)
    seeds = len(result["seeds"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "of one seed, so without a spread"
    text = f"At the end of the run, strength 1; {spread}. The difference is paired by seed, with its 95 % interval."
    body = table(columns, rows, "stack num") + _all_values(result) if rows else ""
    return Section("numbers", "Numbers", text, body)


def paired(result: Result) -> Section:
    """Tables with a chart of every paired difference, grouped by metric; those with nulls folded."""
    arms = main_arms(result)
    groups: dict[tuple[str, str], list[Pair]] = {}
    for metric in result["metrics"]:
        for pair in pairs_of(result, metric["key"]):
            groups.setdefault((pair["arm"], pair["against"]), []).append(pair)
    opened, folded = [], []
    for (arm, against), pairs in groups.items():
        title, body = f"{arm_name(result, arm)} {MINUS} {arm_name(result, against)}", _forest(result, pairs)
        if arm in arms and against in arms:
            opened.append(f"<h3>{escaped(title)}</h3>{body}")
        else:
            folded.append(details(title, body))
    found = [pair for pairs in groups.values() for pair in pairs if is_known(pair["low"])]
    text = (
        "Each seed gives one difference between two arms that share everything else: a small dot. The large mark is "
        "their mean, the bar its 95 % interval (t). An interval that holds 0 shows no difference."
    )
    if found:
        text += (
            f" Of {len(found)} such intervals about {len(found) / 20:.2g} would leave out 0 by chance alone."
            " What the seeds “could find” is the smallest difference that so many show with 80 % power."
        )
    return Section("differences", "Paired differences", text, "".join(opened + folded))


def _metric_title(metric: Mapping[str, Any]) -> str:
    note = ". ".join(part for part in (_BETTER.get(metric["better"]), metric["help"].rstrip(".")) if part)
    return f"{escaped(metric['name'])} <small>{escaped(note)}</small>"


def _difference(result: Result, metric: str, first: Pair) -> str:
    for pair in pairs_of(result, metric):
        if all(pair[part] == first[part] for part in ("arm", "against", "matched")):
            digits = metric_of(result, metric)["digits"]
            notes = (interval(pair["low"], pair["high"], digits), pair_words(result, pair))
            small = "".join(f"<small>{escaped(note)}</small>" for note in notes if note)
            return f"{figure(pair['mean'], digits, signed=True)} {small}"
    return ""


def _all_values(result: Result) -> str:
    """Every arm, nulls too, and every seed."""
    measured = [by_seed for by_seed in result["values"].values() if by_seed]
    metrics = [m for m in result["metrics"] if any(values_of(by_seed, m["key"]) for by_seed in measured)]
    rows = [
        [escaped(arm_name(result, arm)), escaped(seed), *(figure(figures.get(m["key"]), m["digits"]) for m in metrics)]
        for arm, by_seed in result["values"].items()
        for seed, figures in by_seed.items()
    ]
    columns = ["arm", "seed", *(metric["name"] for metric in metrics)]
    return details("Every arm and seed", f'<div class="wide">{table(columns, rows)}</div>') if rows else ""


def _forest(result: Result, pairs: Sequence[Pair]) -> str:
    bodies = []
    for key in dict.fromkeys(pair["metric"] for pair in pairs):
        metric = metric_of(result, key)
        here = [pair for pair in pairs if pair["metric"] == key]
        scale = pair_scale(here)
        rows = [f'<tr class="title"><th colspan="4" scope="rowgroup">{_metric_title(metric)}</th></tr>']
        for pair in here:
            bounds = interval(pair["low"], pair["high"], metric["digits"]) or NOTHING
            cells = [
                f'<span class="keep">{escaped(_MATCHED.get(pair["matched"], pair["matched"]))}</span>',
                pair_row(result, pair, scale),
                f"{figure(pair['mean'], metric['digits'], signed=True)} <small>{bounds}</small>",
                f"{escaped(pair_words(result, pair))} <small class='says'>{_power(pair, metric['digits'])}</small>",
            ]
            rows.append(charted_row(_PAIR_COLUMNS, cells))
        axis = f"{axis_row(scale)}{pair_sides(result, here[0])}"
        rows.append(charted_axis(_PAIR_COLUMNS, axis))
        bodies.append(f'<tbody class="rows">{"".join(rows)}</tbody>')
    return charted_table(_PAIR_COLUMNS, bodies)


def _power(pair: Pair, digits: int) -> str:
    seeds = f"{pair['n']} seed{'s' if pair['n'] != 1 else ''}"
    return f"{seeds} could find ≥ {figure(pair['detectable'], digits)}" if is_known(pair["detectable"]) else seeds
