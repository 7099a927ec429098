"""The section of docs/generalization.md on where the average of LoRAs lies, and docs/average_plane.png.

    python -m benchmarks.average_flatness_page

Both are made of benchmarks/average_flatness.json. Differences have 95 % intervals over groups of seeds, and over icons
where a figure has a value for each.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.average_flatness import (
    AVERAGE,
    BASE,
    CUT,
    FILE,
    HELDOUT,
    MEMBER_NAMES,
    SEGMENTS,
    TRAINING,
    WEAKENED,
)
from benchmarks.populations import UNIT
from benchmarks.populations_page import MINUS, PAGE, table
from flatlora_diffusion.charts.lines import Chart, styled, surface_chart
from flatlora_diffusion.charts.palette import INK, PAPER
from flatlora_diffusion.evaluation.crossed_statistics import CrossedDifference, crossed_difference

PICTURE = PAGE.with_name("average_plane.png")
START, END = "<!-- flatness of the average -->", "<!-- end of the flatness of the average -->"
SET_WORDS = {TRAINING: "training", HELDOUT: HELDOUT}
AROUND = (
    "Around W', with differences in percent: the average less the mean of its members, less its first member weakened "
    "until its change is as long, and the average cut to rank 4 less the members:"
)
PANELS = {TRAINING: "training icons", HELDOUT: f"held-out icons ({HELDOUT})"}
_ALIKE = {
    "between members": [segment for segment in SEGMENTS if AVERAGE not in segment],
    "member to average": [segment for segment in SEGMENTS if segment[0] in MEMBER_NAMES and segment[1] == AVERAGE],
    "average to base": [(AVERAGE, BASE)],
}

Result = dict[str, Any]


def table_of(result: Result, name: str, measure: str, points: Sequence[str]) -> np.ndarray:
    """The mean of some points' values of a measure in 10⁻⁵: (groups, icons), or (groups, 1)."""
    rows = [[_numbers(group[point][name][measure]) for point in points] for group in result["points"].values()]
    return np.asarray(rows).mean(axis=1)


def percent_less(result: Result, name: str, measure: str, point: str, others: Sequence[str]) -> CrossedDifference:
    """A point's value less the mean of the `others`', in percent of that mean over all icons of the group."""
    reference = table_of(result, name, measure, others)
    difference = table_of(result, name, measure, [point]) - reference
    return crossed_difference((100 * difference / reference.mean(axis=1, keepdims=True)).tolist())


def along(result: Result, name: str, kind: str) -> list[CrossedDifference]:
    """The loss along the segments of a kind, both ends included, less the mean of the members."""
    members = table_of(result, name, "loss", MEMBER_NAMES)
    found = []
    for place in range(len(result["between"]) + 2):
        tables = [on_segment(result, name, one, other, place) for one, other in _ALIKE[kind]]
        found.append(crossed_difference((np.mean(tables, axis=0) - members).tolist()))
    return found


def section(result: Result) -> str:
    """The tables, between the markers of the page."""
    return "\n".join(
        [
            f"{textwrap.fill(_facts(result), 120)}\n",
            "Loss less the members' mean, from the first end of each segment to the second:\n",
            *_segments(result),
            f"\n{textwrap.fill(AROUND, 120)}\n",
            *_figures(result),
        ]
    )


def picture(result: Result) -> Chart:
    """The loss over the plane through three members, less that at their mean; one panel for each set."""
    plane, lengths = result["plane"], result["lengths"]["0"]
    unit = float(np.mean([lengths[name] for name in MEMBER_NAMES]))
    middle = len(plane["axis"]) // 2
    surfaces = []
    for name in (TRAINING, HELDOUT):
        grid = np.asarray(plane["losses"][name])
        surfaces.append((PANELS[name], ((grid - grid[middle, middle]) / UNIT).tolist()))
    chart = surface_chart(surfaces, plane["axis"][-1] / unit, "Loss over the plane through three LoRAs")
    with styled(10):
        panels = chart.figure.axes[: len(surfaces)]
        for axes in panels:
            _mark(axes, np.asarray(plane["members"]) / unit)
        panels[0].set_ylabel("lengths of a LoRA's change of W")
        panels[-1].child_axes[0].set_ylabel("loss less the average's, in 10⁻⁵")
    return chart


def _mark(axes: Axes, members: np.ndarray) -> None:
    """The triangle of the members and the average in its middle, in place of the chart's own cross."""
    axes.lines[0].remove()
    axes.plot(*np.concatenate([members, members[:1]]).T, color=PAPER.light, linewidth=1, alpha=0.8)
    drawn: dict[str, Any] = {"linestyle": "none", "color": PAPER.light, "markeredgecolor": INK.light}
    axes.plot(*members.T, marker="o", markersize=7, **drawn)
    axes.plot(0, 0, marker="*", markersize=13, **drawn)
    words: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "color": PAPER.light}
    for number, (x, y) in enumerate(members, 1):
        axes.annotate(f"LoRA {number}", (x, y), (0, 8 if y > 0 else -17), **words)
    axes.annotate("average", (0, 0), (0, -18), **words)
    axes.set(xlabel="lengths of a LoRA's change of W", xticks=(-1, 0, 1), yticks=(-1, 0, 1))


def _facts(result: Result) -> str:
    lengths = list(result["lengths"].values())
    groups, icons = len(lengths), {name: len(of) for name, of in result["icons"].items()}
    draws = result["flatness"]["probe_draws"]

    def share(of: str) -> str:
        return f"{np.mean([one[of] / np.mean([one[name] for name in MEMBER_NAMES]) for one in lengths]):.2f}"

    return (
        f"{groups} groups of three seeds; {icons[TRAINING]} training icons and {icons[HELDOUT]} of *known 200*; "
        f"(noise, timestep) draws an icon: {draws}. In lengths of a member's change of W, two members lie "
        f"{share('between members')} apart, each {share('member to average')} from their average, and the average's "
        f"change has length {share(AVERAGE)}."
    )


def _segments(result: Result) -> list[str]:
    places = ["first end", *(f"{place:g}" for place in result["between"]), "second end"]
    rows = [
        [kind, SET_WORDS[name], *(_interval(one) for one in along(result, name, kind))]
        for kind in _ALIKE
        for name in (TRAINING, HELDOUT)
    ]
    return table(["segment", "icons", *places], rows)


def _figures(result: Result) -> list[str]:
    rows = []
    first = result["points"]["0"]
    for measure in first[AVERAGE][TRAINING]:
        for name in (TRAINING, HELDOUT):
            means = [table_of(result, name, measure, points).mean() for points in ([BASE], MEMBER_NAMES, [AVERAGE])]
            differences = [percent_less(result, name, measure, AVERAGE, MEMBER_NAMES)]
            if measure in first[CUT][name]:
                differences.append(percent_less(result, name, measure, AVERAGE, [WEAKENED]))
                differences.append(percent_less(result, name, measure, CUT, MEMBER_NAMES))
            empty = [""] * (3 - len(differences))
            said = [_words(measure), SET_WORDS[name], *map(_number, means)]
            rows.append([*said, *map(_interval, differences), *empty])
    head = ["", "icons", "base", "members", "average", "less members", "less weakened", "rank 4, less members"]
    return table(head, rows)


def _words(measure: str) -> str:
    kind, _, size = measure.partition(" ")
    return {
        "loss": "loss",
        "rise": f"rise, sigma {size}",
        "worst": f"worst case, radius {size}",
        "trace": "Hessian trace",
    }[kind]


def on_segment(result: Result, name: str, one: str, other: str, place: int) -> np.ndarray:
    """(groups, icons), at one of the ends or of the places between them."""
    if place in (0, len(result["between"]) + 1):
        return table_of(result, name, "loss", [one if place == 0 else other])
    groups = result["segments"].values()
    return np.asarray([_numbers(group[f"{one} to {other}"][name][place - 1]) for group in groups])


def _numbers(text: str) -> np.ndarray:
    return np.asarray([float(value) for value in text.split(" ")])


def _interval(found: CrossedDifference) -> str:
    if abs(found.mean) < 1e-9:
        return "0"
    if found.margin is None:
        return _number(found.mean, "+")
    digits = 1 if found.margin < 9.5 else 0
    return f"{_number(found.mean, '+', digits)} ± {found.margin:.{digits}f}"


def _number(value: float, sign: str = "", digits: int | None = None) -> str:
    digits = int(abs(value) < 99.5) if digits is None else digits
    return f"{value:{sign}.{digits}f}".replace("-", MINUS)


def main() -> None:
    result = json.loads(FILE.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n{section(result)}\n\n{END}{after}", encoding="utf-8")
    picture(result).save(PICTURE)


if __name__ == "__main__":
    main()
