"""docs/why.md: the tables and the figure of `gradient_change`, made from its JSON.

    python -m benchmarks.gradient_change_page

A figure is the mean over a seed's steps, then over seeds, with the 95 % interval of Student's t over seeds: a seed has
batches and draws of its own, so there is nothing that seeds and batches cross in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.gradient_change import EARLIER, RANKS
from benchmarks.populations_page import MINUS, table
from flatlora_diffusion.charts.lines import Chart, PlainNumbers, styled
from flatlora_diffusion.charts.palette import FAINT, FLAT_LORA, INK, LORA, THIRD, Look
from flatlora_diffusion.evaluation.crossed_statistics import CrossedDifference, crossed_difference

RESULT = Path(__file__).with_name("gradient_change.json")
PAGE = Path(__file__).parents[1] / "docs" / "why.md"
FIGURE = "why.png"
START, END = "<!-- figures -->", "<!-- end of figures -->"
OWN, OLD, NOISE = "own batch", "older or other batches", "random noise"
LOOKS: dict[str, Look] = {OWN: THIRD, OLD: LORA, NOISE: FLAT_LORA}
SAM_LENGTH = "of SAM's length"
BI_LORA = "Bi-LoRA's second LoRA"
KINDS: dict[str, tuple[str, str]] = {
    **{f"rank {rank}": (f"own slope, sketch of rank {rank}", OWN) for rank in sorted(RANKS, reverse=True)},
    "up blocks": ("own slope, up blocks alone", OWN),
    "other images": ("slope of other images", OLD),
    "previous step": ("slope of the previous step", OLD),
    f"mean of {EARLIER} earlier": (f"mean slope of {EARLIER} earlier steps", OLD),
    "momentum": ("momentum of earlier slopes, 0.9", OLD),
    BI_LORA: (BI_LORA, OLD),
    SAM_LENGTH: ("random noise (Eq. 7)", NOISE),
}
"""What the page calls each eps of SAM's length, and where it comes from."""
ALIKE = {
    "batches": "two batches",
    "images, all else alike": "two images, same noise and timestep",
    "timesteps of an image": "one image and noise, two timesteps",
    "noises of an image": "one image and timestep, two noises",
}

Result = Mapping[str, Any]
Read = Callable[[Mapping[str, Any]], float]
"""A figure of one step of one seed."""


class Row(NamedTuple):
    """A row of the figure: the cosine to SAM's change, also of each step, and the change's length in that of SAM's."""

    name: str
    look: Look
    cosine: CrossedDifference
    length: CrossedDifference
    steps: list[float]


def main() -> None:
    result = read()
    before, after = PAGE.read_text(encoding="utf-8").split(START)[0], PAGE.read_text(encoding="utf-8").split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n{tables(result)}\n\n{END}{after}", encoding="utf-8")
    draw_figure(result, PAGE.with_name(FIGURE))
    print(PAGE)


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def of_kind(result: Result, kind: str, key: str, share: str = "1") -> list[list[float]]:
    """Of an eps of SAM's length, by seed and step: of noise with low-rank draws, of Bi-LoRA in runs of its own."""
    if kind == BI_LORA:
        return by_seed(result, lambda step: float(step[key]), "bi-lora")
    if kind == SAM_LENGTH:
        return of_noise(result, kind, key)
    return by_seed(result, lambda step: float(step["eps"][share][kind][key]))


def lifts(result: Result, kind: str) -> list[list[float]]:
    """How far an eps of SAM's length lifts the loss to first order, SAM's being 1, by seed and step."""
    if kind == BI_LORA:
        return by_seed(result, lambda step: float(step["slopes"]), "bi-lora")
    return by_seed(result, lambda step: float(step["slopes"][kind]))


def of_noise(result: Result, strength: str, key: str, draw: str = "low_rank") -> list[list[float]]:
    """Of Flat-LoRA's noise with a sigma, by seed and step."""
    return by_seed(result, lambda step: float(step["noise"][draw][strength][key]))


def in_common(result: Result, sigma: str) -> list[list[float]]:
    """The share of a change's energy that is the same in all draws, by seed and step.

    Less that of the same draws at SAM's length: changes are linear in eps there, so that what these few draws have in
    common is chance.
    """

    def of_step(step: Mapping[str, Any]) -> float:
        found = step["noise"]["low_rank"]
        return float(found[sigma]["common"] - found[SAM_LENGTH]["common"])

    return by_seed(result, of_step)


def along_gradient(result: Result, sigma: str) -> list[list[float]]:
    """The mean change of all draws along the gradient at W, in the length of that; less what is linear in eps."""

    def along(found: Mapping[str, float]) -> float:
        return found["mean to gradient"] * found["mean length"] * found["of gradient"]

    def of_step(step: Mapping[str, Any]) -> float:
        found = step["noise"]["low_rank"]
        return float(along(found[sigma]) - along(found[SAM_LENGTH]) * found[sigma]["eps"] / found[SAM_LENGTH]["eps"])

    return by_seed(result, of_step)


def by_seed(result: Result, value: Read, of: str = "seeds") -> list[list[float]]:
    return [[value(step) for step in seed["steps"]] for seed in result[of]]


def over_seeds(values: list[list[float]]) -> CrossedDifference:
    """The mean over steps and seeds, with its interval over seeds."""
    return crossed_difference([[sum(own) / len(own)] for own in values])


def sigmas(result: Result) -> list[str]:
    return [name for name in result["seeds"][0]["steps"][0]["noise"]["low_rank"] if name != SAM_LENGTH]


def tables(result: Result) -> str:
    """All that stands between the markers of the page."""
    return "\n\n".join(write(result) for write in (_conditions, _alike, _directions, _noise, _shared))


def _conditions(result: Result) -> str:
    settings, plan, seeds = result["settings"], result["plan"], len(result["seeds"])
    last = plan["first"] + (plan["steps"] - 1) * plan["apart"]
    rise = by_seed(result, lambda step: float(step["rise"]))
    rhos = [seed["rho"] for seed in result["seeds"]]
    return (
        f"{seeds} seeds, in each {plan['steps']} steps from {plan['first']} to {last} of a plain LoRA: the tiny base, "
        f"{result['images']} 3D icons, attention layers, rank {settings['rank']}, batch "
        f"{settings['train_batch_size']}, learning rate {settings['learning_rate']:g}. Figures are means ± half of "
        f"the 95 % interval over seeds. SAM's rho, found by `--rho_rise {settings['rho_rise']:g}` before the first "
        f"step, is {min(rhos):g} to {max(rhos):g}; at the measured steps it lifts the loss to first order by "
        f"{said(rise)} times itself."
    )


def _alike(result: Result) -> str:
    rows = [[words, said([[seed["alike"][key]] for seed in result["seeds"]])] for key, words in ALIKE.items()]
    cosines = _joined(["slopes of", "cosine"], rows)
    return f"**How alike are slopes?** The cosine of two, at the same weights:\n\n{cosines}"


def _directions(result: Result) -> str:
    rows = []
    for kind, (words, _) in KINDS.items():
        cosines = of_kind(result, kind, "cosine")
        half = "" if kind in (BI_LORA, SAM_LENGTH) else said(of_kind(result, kind, "cosine", "0.5"))
        lift = "" if kind == SAM_LENGTH else said(lifts(result, kind))
        lengths = [said(of_kind(result, kind, key)) for key in ("of SAM", "of gradient")]
        rows.append([words, lift, said(cosines), _span(cosines), half, *lengths])
    columns = ["eps along", "lift, SAM's 1", "cosine to SAM's change", "in single steps", "at half of rho"]
    columns += ["length, SAM's 1", "length, gradient's 1"]
    own, to_gradient = (said(of_kind(result, "SAM", key)) for key in ("of gradient", "to gradient"))
    return (
        "**What does eps of SAM's length change?** SAM's own change has "
        f"{own} times the length of the gradient at W, and a cosine of {to_gradient} to it. Other eps, all of length "
        "rho; the lift of the loss, to first order, is the cosine of eps to the step's own slope:"
        f"\n\n{_joined(columns, rows)}"
    )


def _noise(result: Result) -> str:
    rows = []
    for draw, words in (("low_rank", "low-rank"), ("full", "full")):
        for sigma in sigmas(result):
            longer = over_seeds(of_noise(result, sigma, "eps", draw)).mean
            cells = [said(of_noise(result, sigma, key, draw)) for key in ("of gradient", "kept", "cosine")]
            rows.append([f"{sigma}, {words}", f"{longer:.0f}", *cells])
    columns = ["sigma, draws", "length of eps, rho 1", "length of the change, gradient's 1"]
    columns += ["cosine of the gradients at W + eps and W", "cosine to SAM's change"]
    return (
        "**What does one draw of Flat-LoRA's own noise change?** Low-rank draws are the default, full ones are Eq. 7 "
        f"by the letter:\n\n{_joined(columns, rows)}"
    )


def _shared(result: Result) -> str:
    rows = []
    for sigma in sigmas(result):
        share = in_common(result, sigma)
        along = said(along_gradient(result, sigma), 3)
        rows.append([sigma, said(share, 3), passes(over_seeds(share)), said(of_noise(result, sigma, "halves")), along])
    columns = [
        "sigma",
        "share of a change's energy",
        "draws until it is half",
        "cosine of half the draws to the others",
    ]
    columns.append("along the gradient, its length 1")
    return (
        f"**What do all draws have in common?** {result['plan']['draws']['low_rank']} low-rank draws for each step; "
        "share and length are less what the same draws, made as short as SAM's eps, have by chance:"
        f"\n\n{_joined(columns, rows)}"
    )


def _joined(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(table(head, rows))


def _span(values: list[list[float]]) -> str:
    """The ends of all values."""
    every = [one for own in values for one in own]
    return f"{min(every):.2f} to {max(every):.2f}".replace("-", MINUS)


def passes(share: CrossedDifference) -> str:
    """How many draws' mean has as much of what is common to all as of what is each draw's own: (1 - share) / share."""
    if share.low is None or share.high is None or share.high <= 0:
        return "not seen"
    least = (1 - share.high) / share.high
    if share.low <= 0:
        return f"over {least:.0f}"
    return f"{(1 - share.mean) / share.mean:.0f} ({least:.0f} to {(1 - share.low) / share.low:.0f})"


def said(values: list[list[float]], digits: int = 2) -> str:
    """Mean and half of its interval; more digits where these show none."""
    found = over_seeds(values)
    while digits < 4 and 0 < abs(found.mean) + (found.margin or 0) < 10**-digits:
        digits += 1
    mean = f"{round(found.mean, digits) + 0.0:.{digits}f}".replace("-", MINUS)  # no minus before 0
    return mean if found.margin is None else f"{mean} ± {found.margin:.{digits}f}"


def figure_rows(result: Result) -> list[tuple[str, list[Row]]]:
    """Rows of the figure in groups."""

    def row(name: str, look: Look, cosines: list[list[float]], lengths: list[list[float]]) -> Row:
        return Row(name, look, over_seeds(cosines), over_seeds(lengths), [one for own in cosines for one in own])

    same = [
        row(words, LOOKS[source], of_kind(result, kind, "cosine"), of_kind(result, kind, "of SAM"))
        for kind, (words, source) in KINDS.items()
    ]
    noise = [
        row(f"sigma {sigma}", FLAT_LORA, of_noise(result, sigma, "cosine"), of_noise(result, sigma, "of SAM"))
        for sigma in sigmas(result)
    ]
    return [("eps as long as SAM's, along", same), ("Flat-LoRA's own noise", noise)]


def draw_figure(result: Result, file: Path) -> None:
    """Cosine and length of the changes, two panels with one list of names."""
    groups = figure_rows(result)
    names: list[tuple[float, str, bool]] = []
    with styled(11):
        figure = Figure(figsize=(9.6, 1.5 + 0.29 * sum(len(rows) + 1 for _, rows in groups)))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        place = 0.0
        for group, rows in groups:
            names.append((place, group, True))
            for row in rows:
                place -= 1
                names.append((place, row.name, False))
                left.plot(row.steps, [place] * len(row.steps), "o", color=row.look.tone.light, alpha=0.25, ms=4, mew=0)
                _mark(left, place, row.cosine, row.look)
                _mark(right, place, row.length, row.look)
            place -= 1.4
        left.set_yticks([at for at, _, _ in names], [text for _, text, _ in names])
        for label, (_, _, is_head) in zip(left.get_yticklabels(), names, strict=True):
            label.set(color=INK.light if is_head else FAINT.light, fontweight="bold" if is_head else "normal")
        for axes, at in ((left, 0.0), (right, 1.0)):
            axes.axvline(at, color=INK.light, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
            axes.set_ylim(place + 0.9, 0.7)
            axes.tick_params("y", length=0)
            axes.grid(visible=False, axis="y")
        _scale(left, right)
        figure.suptitle(
            "What eps does to a step's gradient, beside what SAM does to it", x=0.02, ha="left", fontsize=13
        )
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    Chart(figure).save(file)


def _scale(left: Axes, right: Axes) -> None:
    left.set_xlim(-1.05, 1.05)
    left.set_xlabel("cosine of the change to SAM's; faint: single steps", labelpad=8)
    right.set_xscale("log")
    right.set_xlim(0.003, 2)
    right.xaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1]))
    right.xaxis.set_minor_locator(NullLocator())
    for axes in (left, right):
        axes.xaxis.set_major_formatter(PlainNumbers())
    right.set_xlabel("length of the change, SAM's 1", labelpad=8)


def _mark(axes: Axes, place: float, found: CrossedDifference, look: Look) -> None:
    colour = look.tone.light
    if found.low is not None and found.high is not None:
        bar: dict[str, Any] = {"color": colour, "mec": colour, "lw": 2, "mew": 2, "ms": 7, "zorder": 2}
        axes.plot((found.low, found.high), (place, place), "|-", **bar)
    axes.plot(found.mean, place, look.marker, color=colour, ms=7, zorder=3)


if __name__ == "__main__":
    main()
