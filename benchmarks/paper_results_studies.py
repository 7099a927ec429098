"""The tables of docs/results.md that `paper_language` and `paper_vision` fill, beside those of the paper."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import paper_published as published
from benchmarks.paper_flatness import table
from benchmarks.paper_study_arms import ARMS, CONSTANT_SIGMAS, RANKS, RHOS, SIGMAS, VARIANT_ARMS
from benchmarks.paper_words import POINTS, interval, is_told, signed
from flatlora_diffusion.compare.paired import CONFIDENCE, paired_difference

Tables = Mapping[str, Mapping[str, Any]]  # arms and sweeps by task
STUDIES = {"language": "MiniLM-L6", "vision": "a ViT of 2.8 million parameters"}
TESTS = {"test": "in domain", "shifted": "shifted"}
RISE = "rise"
FLATNESS = "rise of the test loss under eps of sigma 0.1 at W', in 10⁻³, lower is flatter"
TITLES = {
    "flat": "Flat-LoRA, full draws",
    "flat low_rank": "Flat-LoRA, low-rank draws",
    "iid": "iid noise of equal energy",
    "lora-sam": "SAM over A and B",
    "sam": "SAM over W",
    "weight decay": "weight decay",
    "dropout": "LoRA dropout",
}


def points(found: Mapping[str, Any]) -> str:
    """A difference of accuracies with its interval, in points."""
    return interval(found, scale=POINTS)


def rises(found: Mapping[str, Any]) -> str:
    """A difference of the loss's rises with its interval."""
    return interval(found, scale=1e3)


def tasks(found: Mapping[str, Any]) -> str:
    """How large each task is, and how its arms were trained."""
    rows = []
    for task, seen in found["tasks"].items():
        sizes, how = seen["sizes"], seen["how"]
        own = ("class_count", "train", "validation", "test")
        shifted = ", ".join(f"{name} {count}" for name, count in sizes.items() if name not in own)
        trained = (f"{how[key]:g}" for key in ("trials", "seeds", "steps", "lr_factor"))
        rows.append([task, *(f"{sizes[key]}" for key in own), shifted, *trained])
    sizes = ["classes", "training", "validation", "test, in domain", "tests, shifted"]
    return table(["task", *sizes, "trials an arm", "seeds", "steps", "rates multiplied by"], rows)


def pooled(tables: Tables, arm: str, metric: str, against: str | None = None, of: int = 1) -> dict[str, Any]:
    """The mean over tasks of an arm's difference to its partner or to another arm's, paired by seed.

    Where it is one `of` so many that could have been shown, the interval is Bonferroni's.
    """
    by_task = [_differences(arms, arm, metric, against) for arms in tables.values() if arm in arms]
    means = [statistics.fmean(seeds) for seeds in zip(*by_task, strict=True)]
    return asdict(paired_difference(means, [0.0] * len(means), 1 - (1 - CONFIDENCE) / of))


def told(tables: Tables, arm: str, metric: str) -> tuple[int, int]:
    """On how many tasks an arm is better and worse than its partner, by intervals that leave 0 out."""
    found = [table[arm]["difference"][metric] for table in tables.values()]
    return sum(is_told(one) and one["low"] > 0 for one in found), sum(
        is_told(one) and one["high"] < 0 for one in found
    )


def accuracies(rows_of_paper: published.Ranks, tables: Tables) -> str:
    """Tables 1 and 2: LoRA and Flat-LoRA by rank, the paper's tasks and then ours."""
    rows = [
        [f"paper, {name}", f"{rank}", f"{seen.lora:.2f}", f"{seen.flat:.2f}", signed(seen.difference, scale=1)]
        for name, ranks in rows_of_paper.items()
        for rank, seen in ranks.items()
    ]
    for task, arms in tables.items():
        pairs = {"8": ("lora", "flat"), "16, rates of 8": ("rank 16", "flat rank 16")}
        for rank, (lora, flat) in ((rank, pair) for rank, pair in pairs.items() if pair[0] in arms):
            for metric, words in TESTS.items():
                means = [f"{100 * arms[arm]['mean'][metric]:.2f}" for arm in (lora, flat)]
                difference = points(arms[flat]["difference"][metric])
                rows.append([f"here, {task}, {words}", rank, *means, difference])
    return table(["", "rank", "LoRA", "Flat-LoRA", "difference"], rows)


def rivals(tables: Tables) -> str:
    """Every arm with as many trials less LoRA, task by task."""
    arms = _by_test(tables, {arm: TITLES[arm] for arm in ARMS if arm != "lora"})
    return "\n\n".join(filter(None, (arms, _rhos(tables))))


def variants(tables: Tables) -> str:
    """Table 5: each variant less LoRA, and with the flat loss less without."""
    alone = [arm for arm in VARIANT_ARMS if not arm.startswith("flat ")]
    rows = {arm: f"{arm}, less {VARIANT_ARMS[arm].against}" for name in alone for arm in (name, f"flat {name}")}
    return _by_test(tables, rows)


def _rhos(tables: Tables) -> str:
    """Both SAMs less LoRA by rho, in domain and shifted, over the tasks that swept it."""
    swept = {task: arms for task, arms in tables.items() if f"sam rho {RHOS[0]}" in arms}
    if not swept:
        return ""
    rows = [
        [
            f"{rho:g}",
            *(points(pooled(swept, f"{arm} rho {rho}", metric)) for arm in ("lora-sam", "sam") for metric in TESTS),
        ]
        for rho in RHOS
    ]
    columns = [f"{over}, {words}" for over in ("A and B", "W") for words in TESTS.values()]
    return f"By rho, LoRA's own learning rate, on {', '.join(swept)}:\n\n{table(['rho', *columns], rows)}"


def ranks(tables: Tables) -> str:
    """Figure 5: Flat-LoRA less LoRA of the same rank."""
    arms = {rank: f"flat rank {rank}" for rank in RANKS}
    swept = {rank: arm for rank, arm in arms.items() if any(arm in one for one in tables.values())}
    rows = [[f"{rank}", *(points(pooled(tables, arm, metric)) for metric in TESTS)] for rank, arm in swept.items()]
    return table(["rank", *TESTS.values()], rows)


def sigmas(tables: Tables) -> str:
    """Flat-LoRA less LoRA by sigma and schedule, and the rise of the loss at W'."""
    cells = [f"sigma {sigma} cosine" for sigma in SIGMAS] + [f"sigma {sigma} constant" for sigma in CONSTANT_SIGMAS]
    rows = [
        [arm, *(points(pooled(tables, arm, metric)) for metric in TESTS), f"{_ratio(tables, arm, 'rise'):.2f}"]
        for arm in cells
    ]
    return table(["", *TESTS.values(), "rise of the loss / LoRA's"], rows)


def severities(tables: Tables) -> str:
    """Figure 4: Flat-LoRA less LoRA by the severity of the corruptions, and on the style that none has seen."""
    metrics = {f"severity {number}": f"{number}" for number in range(1, 6)}
    rows = [
        [
            words,
            f"{published.FIGURE_4[int(words)]:+.2f}" if int(words) in published.FIGURE_4 else "",
            points(pooled(tables, "flat", metric)),
        ]
        for metric, words in metrics.items()
    ]
    drawn = {task: arms for task, arms in tables.items() if "3d" in arms["flat"]["mean"]}
    if drawn:
        rows.append(["3D drawings", "", points(pooled(drawn, "flat", "3d"))])
    return table(["severity", "paper, CIFAR-100-C", "here"], rows)


def costs(tables: Tables) -> str:
    """CPU seconds of a training, by arm, as multiples of LoRA's."""
    names = [*ARMS, *VARIANT_ARMS]
    rows = [[arm, f"{_ratio(tables, arm, 'seconds'):.2f}"] for arm in names if arm != "lora"]
    half = -(-len(rows) // 2)
    wide = [[*one, *other] for one, other in zip(rows[:half], [*rows[half:], ["", ""]], strict=False)]
    return table(["arm", "seconds / LoRA's"] * 2, wide)


def surface_section(found: Mapping[str, Any], model: str) -> str:
    """Whose surfaces are shown, and how the loss rises around W', paired by draw of eps."""
    lora, flat = found["figures"]
    rows = [["loss at W'", *(f"{found['losses'][one['name']]:.4f}" for one in (lora, flat)), ""]]
    for place, sigma in enumerate(found["settings"]["sigmas"]):
        values = [one["rises"]["filter"][place]["values"] for one in (lora, flat)]
        difference = interval(asdict(paired_difference(values[1], values[0])), 4, scale=1)
        means = (f"{statistics.fmean(draws):.4f}" for draws in values)
        rows.append([f"mean rise under eps, sigma {sigma:g}", *means, difference])
    names = [lora["name"], flat["name"]]
    sigma, draws = found["runs"][flat["name"]]["sigma"], found["settings"]["rise_draws"]
    model = f"{model[0].upper()}{model[1:]}"
    return (
        f"{model} on {found['task']}, {' and '.join(names)} of seed {found['seed']}, each as tuned "
        f"(sigma {sigma:g}); {found['rows']} validation examples; intervals over {draws} draws of eps, not over "
        "trainings:\n\n" + table(["", *names, "difference"], rows)
    )


def _by_test(tables: Tables, arms: Mapping[str, str]) -> str:
    """A table in domain, one under shift and one of flatness at W': `arms` with their words, by task."""
    parts = []
    for metric, title in {**TESTS, RISE: FLATNESS}.items():
        rows = []
        write = rises if metric == RISE else points
        for arm, words in arms.items():
            found = [one[arm]["difference"][metric] for one in tables.values()]
            rows.append([words, *map(write, found), write(pooled(tables, arm, metric))])
        parts.append(f"{title[0].upper()}{title[1:]}:\n\n{table(['', *tables, 'mean of the tasks'], rows)}")
    return "\n\n".join(parts)


def _differences(arms: Mapping[str, Any], arm: str, metric: str, against: str | None) -> Sequence[float]:
    found: Sequence[float] = arms[arm]["difference"][metric]["differences"]
    if against is None:
        return found
    other: Sequence[float] = arms[against]["difference"][metric]["differences"]
    return [one - two for one, two in zip(found, other, strict=True)]


def _ratio(tables: Tables, arm: str, metric: str) -> float:
    """To LoRA's, the mean of the tasks."""
    having = [arms for arms in tables.values() if arm in arms]
    return statistics.fmean(arms[arm]["mean"][metric] / arms["lora"]["mean"][metric] for arms in having)
