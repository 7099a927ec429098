"""The sections of the page of `paper_variants`: each part's tables and what they mean."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.paper_flatness import table
from benchmarks.paper_variants_answer import verdict
from benchmarks.paper_variants_figures import METRICS, Result
from benchmarks.paper_variants_parts import MAP_PICTURE
from benchmarks.paper_variants_plan import CELL_KEYS, SCHEDULES, SIGMAS
from benchmarks.paper_words import MINUS, UNIT, interval, signed
from flatlora_diffusion.compare.arms import parse_arm

TRIALS_SHOWN = 5  # of each method, the best


def _map(result: Result) -> str:
    found = cells_of(result)
    rows = [
        [
            f"{sigma:g}",
            *(
                " / ".join(signed(found[schedule, sigma][key]["mean"], 1) for key in ("report", "chosen", "train"))
                for schedule in SCHEDULES
            ),
        ]
        for sigma in SIGMAS
    ]
    seeds = found[SCHEDULES[0], SIGMAS[0]]["report"]["n"]
    text = (
        f"Each cell with {'one seed' if seeds == 1 else f'{seeds} seeds'}, less LoRA of the same: held-out at the "
        f"end / at the chosen checkpoint / clean train, {UNIT}.\n\n{table(['sigma', *SCHEDULES], rows)}\n\n"
        "The cells that end best on the search icons, and the paper's sigma with the cosine ramp, with seeds of "
        "their own:\n\n"
    )
    picture = Path(__file__).with_name(MAP_PICTURE)
    shown = f"\n\n![Pictures by every cell](../benchmarks/{MAP_PICTURE})" if picture.is_file() else ""
    return text + pairs_table(result) + shown


def _draws(result: Result) -> str:
    text = (
        "Noise of sigma 0.8, constant. With one micro-batch a step, as here, one eps for each step and one for each "
        "micro-batch are the same.\n\n"
    )
    return text + pairs_table(result)


def _tuned(result: Result) -> str:
    parts = []
    for method, trials in result["trials"].items():
        best = sorted(trials, key=lambda trial: trial["search"])[:TRIALS_SHOWN]
        rows = [[_name(trial["arm"]), f"{trial['search']:.5f}"] for trial in best]
        head = f"{len(trials)} trials of {parse_arm(method).name}, the best:"
        parts.append(f"{head}\n\n{table(['settings', 'search icons, at the end'], rows)}")
    found = "The best Flat-LoRA less the best LoRA with fresh seeds:"
    return "\n\n".join([*parts, f"{found}\n\n{pairs_table(result)}"])


def _sizes(result: Result) -> str:
    return f"The two that were tuned, both changed alike, Flat-LoRA less LoRA:\n\n{pairs_table(result)}"


def _methods(result: Result) -> str:
    return f"Each chose one of three strengths on the search icons, LoRA one of three rates. {_rivals(result)}"


def _sam(result: Result) -> str:
    rows = [[_name(trial["arm"]), f"{trial['search']:.5f}"] for trial in result["trials"]["sam"]]
    return (
        f"By radius:\n\n{table(['SAM over W', 'search icons, at the end'], rows)}\n\nThe best with fresh seeds, "
        f"beside LoRA with two gradients a step, as many as SAM's, of twice as many images:\n\n{pairs_table(result)}"
    )


def _forgetting(result: Result) -> str:
    rows = [
        [
            _name(one["arm"]),
            _name(one["against"]),
            f"{one['share']:.0%}",
            f"{one['strength']:.2f}",
            f"{len(one['seeds'])}",
            interval(one["report"], 1),
            verdict(one["report"]),
        ]
        for one in result["equal"]
    ]
    columns = ["arm", "against", "forgets", "strength", "seeds", "held-out", "says"]
    return (
        "What learns more forgets more, and a LoRA's strength trades the one for the other. So the same LoRAs were "
        "measured at six strengths and are compared where both have raised the loss of flat icons by such a share of "
        f"what the second one does at strength 1; the strength is the first one's there.\n\n{table(columns, rows)}"
    )


def _adapters(result: Result) -> str:
    return (
        "Each adapter or optimizer chose one of three learning rates on the search icons. They are compared with "
        f"LoRA; then each flat, with Flat-LoRA's sigma, with itself plain. {_rivals(result)}"
    )


def _rivals(result: Result) -> str:
    rows = [
        [
            _name(arm),
            f"{cost['ratio'][1]:.2f} ({cost['ratio'][0]:.2f} to {cost['ratio'][2]:.2f})",
            f"{cost['peak_bytes'] / 2**20:.1f}",
            *(f"{_mean(result, arm, key):.5f}" for key in ("report", "chosen", "train", "flat")),
        ]
        for arm, cost in result["cost"].items()
    ]
    columns = ["arm", "time / LoRA's", "peak MiB of a step", "held-out, end", "chosen", "clean train", "flat icons"]
    return (
        f"The differences:\n\n{pairs_table(result)}\n\nThe time of a step is the median of its ratio to one of "
        "LoRA, taken in turns, with quartiles; memory is what a step holds beyond what is there between steps:\n\n"
        + table(columns, rows)
    )


def _preset(result: Result) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in result["of_preset"].items())
    return (
        f"All that `--preset {result['preset']}` sets but for the method and what saves memory: {settings}. "
        f"SAM finds its rho by its rise, 0.25 where no other is named.\n\n{pairs_table(result)}"
    )


def _felt(result: Result) -> str:
    rows = [
        [_name(pair["arm"]), condition, interval(found["report"], 1), interval(found["flat"], 1)]
        for pair in result["felt"]
        for condition, found in pair["conditions"].items()
    ]
    return f"Less LoRA in the same condition, {UNIT}:\n\n" + table(
        ["arm", "condition", "held-out", "flat icons"], rows
    )


def _again(result: Result) -> str:
    return (
        "Where noise of sigma 0.4 did better above, again with seeds that had no part in finding it, and beside two "
        f"simpler means:\n\n{pairs_table(result)}"
    )


def _domain(result: Result) -> str:
    return (
        "Streamline's emojis, flat with outlines, a set that the base never saw: 23 of them are trained on, the lists "
        f"are of the same set.\n\n{pairs_table(result, without=('style_probability',))}"
    )


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "map": ("Sigma and schedule", _map),
    "draws": ("What the noise is made of", _draws),
    "controls": ("What is simpler", lambda result: pairs_table(result)),
    "tuned": ("Both tuned", _tuned),
    "sizes": ("Where it pays most", _sizes),
    "methods": ("Rival methods", _methods),
    "sam": ("SAM over W, larger and with fresh seeds", _sam),
    "forgetting": ("At equal forgetting", _forgetting),
    "adapters": ("Rival adapters", _adapters),
    "preset": ("With the settings of a preset", _preset),
    "felt": ("What a user feels", _felt),
    "again": ("The same with fresh seeds", _again),
    "domain": ("Another style", _domain),
}


def pairs_table(result: Result, without: tuple[str, ...] = ()) -> str:
    """Every pair of a part in all metrics that were measured, by what its group changes where groups have labels."""
    measured = {key for pair in result["pairs"] for key in pair if key not in without}
    metrics = {key: words for key, words in METRICS.items() if key in measured}
    has_labels = any(pair["label"] for pair in result["pairs"])
    rows = []
    for pair in result["pairs"]:
        names = [pair["label"]] if has_labels else [_name(pair["arm"]), _name(pair["against"])]
        cells = [_cell(pair[key], key) if key in pair else "" for key in metrics]
        rows.append([*names, f"{len(pair['seeds'])}", *cells, verdict(pair["report"])])
    columns = ["where"] if has_labels else ["arm", "against"]
    return table([*columns, "seeds", *metrics.values(), "at the end"], rows)


def _cell(found: Result, metric: str) -> str:
    if metric in ("name_found", "style_probability"):
        return f"{found['mean']:+.2f}".replace("-", MINUS)
    return interval(found, 1)


def _name(key: str) -> str:
    return parse_arm(key).name


def cells_of(result: Result) -> dict[tuple[str, float], Result]:
    by_arm = {pair["arm"]: pair for pair in result["map"]}
    return {cell: by_arm[key] for cell, key in CELL_KEYS.items()}


def _mean(result: Result, arm: str, metric: str) -> float:
    return statistics.fmean(row[metric] for row in result["rows"] if row["arm"] == arm)
