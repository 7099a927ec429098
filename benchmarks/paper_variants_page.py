"""Where does flatness pay? `python -m benchmarks.paper_variants_page` makes docs/variants.md of what was found.

Every number of the page and of its figure comes from benchmarks/paper_variants_PART.json, and so do the sentences that
it begins with. A part that was not run yet says how to run it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.noise_shapes import section as shapes_section
from benchmarks.paper_flatness import table
from benchmarks.paper_variants_answer import answer, headline_table, verdict
from benchmarks.paper_variants_figures import METRICS, Result
from benchmarks.paper_variants_parts import MAP_PICTURE, PARTS
from benchmarks.paper_variants_plan import CELL_KEYS, SCHEDULES, SIGMAS
from benchmarks.paper_words import MINUS, SCALE, UNIT, interval, signed
from flatlora_diffusion.charts.lines import Line, titled_chart
from flatlora_diffusion.charts.palette import FLAT_LORA, FOURTH, THIRD
from flatlora_diffusion.compare.arms import parse_arm

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "variants.md"
FIGURE = "variants.png"
SHAPES = FOLDER / "noise_shapes.json"
LOOKS = {
    "cosine": THIRD._replace(shades=("#7fb3aa",)),  # the lighter one is the chosen checkpoint's
    "constant": FLAT_LORA,
    "down": FOURTH._replace(shades=("#dba3e0",)),
}
TRIALS_SHOWN = 5  # of each method, the best


def main() -> None:
    results = read_results()
    PAGE.write_text(page(results, read_shapes()), encoding="utf-8")
    if "map" in results:
        draw_figure(results["map"], PAGE.with_name(FIGURE))
    print(PAGE)


def read_results(folder: Path = FOLDER) -> dict[str, Result]:
    """What was found, by part, of the parts that were run."""
    files = {part: folder / f"paper_variants_{part}.json" for part in PARTS}
    return {part: json.loads(file.read_text(encoding="utf-8")) for part, file in files.items() if file.is_file()}


def read_shapes() -> Result | None:
    """What `noise_shapes` found, if it was run."""
    found: Result | None = json.loads(SHAPES.read_text(encoding="utf-8")) if SHAPES.is_file() else None
    return found


def page(results: Mapping[str, Result], shapes: Result | None = None) -> str:
    parts = ["# Where does flatness pay?", answer(results)]
    if "map" in results:
        parts.append(f"![Held-out loss less LoRA's by sigma and schedule]({FIGURE})")
    if results:
        parts += [_conditions(results), *_unlike(results), headline_table(results)]
    for part, (title, write) in SECTIONS.items():
        text = write(results[part]) if part in results else _not_run(part)
        parts.append(f"## {title}\n\n{text}")
    parts += [] if shapes is None else [f"## Noise of other shapes\n\n{shapes_section(shapes)}"]
    return "\n\n".join(parts) + "\n"


def draw_figure(result: Result, file: Path) -> None:
    """Each schedule's differences to LoRA by sigma, at the end and at the chosen checkpoint."""
    found = _cells(result)
    lines = [
        Line(
            f"{schedule}, {words}",
            LOOKS[schedule],
            SIGMAS,
            [SCALE * found[schedule, sigma][metric]["mean"] for sigma in SIGMAS],
            shade=shade,
        )
        for shade, (metric, words) in enumerate({"report": "at the end", "chosen": "chosen checkpoint"}.items())
        for schedule in SCHEDULES
    ]
    title = "Held-out loss less LoRA's of the same seed: below 0 the noise helps"
    titled_chart(lines, title, "sigma", f"difference, {UNIT}").save(file)


def _conditions(results: Mapping[str, Result]) -> str:
    one = next(iter(results.values()))
    settings, libraries = one["settings"], one["versions"]
    pairs = [pair for result in results.values() for pair in result.get("pairs", ())]
    seen, alike = sum(len(pair["seeds"]) for pair in pairs), sum(pair["alike"] for pair in pairs)
    machine = f"{one['date']}, {one['device']}, torch {libraries['torch']}, fp32"
    return f"""Made by `python -m benchmarks.paper_variants --work FOLDER`, then
`python -m benchmarks.paper_variants_page`; {machine}.
All figures: `benchmarks/paper_variants_*.json`.

**What was trained.** The tiny base on 23 3D icons, {settings["max_train_steps"]} steps of batch \
{settings["train_batch_size"]}, rank {settings["rank"]}, learning rate {settings["learning_rate"]:g} unless a table \
says another. Two runs of a pair share base, images, crops, noise and timesteps: so it was in {alike} of {seen} pairs,
by hashes of every step; the others have an arm that stops by three of its images, which it does not train on, or one
that sees twice as many images a step.

**What was measured.** The denoising loss at fixed noise and timesteps, without eps. Settings, cells of the map and
checkpoints are chosen on the search icons; what is reported was measured on others, and no list of 3D icons shares an
icon with another or a word with the training icons. *At equal clean loss* compares two runs where both first reach the
same clean training loss, between two checkpoints by a straight line. *Flat icons* are what the base knew before,
drawings of trained and reported things among them: a rise is forgetting. *Loss rise* is that of the training icons
under noise of sigma 0.1 (Eq. 7). Names and 3D are what the judge finds in pictures of
icons that were not trained on, a difference of shares. Losses {UNIT}, lower is better; differences are paired by seed,
with Student's 95 % interval, uncorrected but in the table of headline comparisons. An interval that holds 0 shows
nothing. A small base with 64-pixel icons is no SDXL: what holds here need not hold there, either way."""


def _unlike(results: Mapping[str, Result]) -> list[str]:
    """A paragraph on the parts that were run on another base than the first, or with other settings."""
    first = next(iter(results.values()))
    others = [
        part
        for part, result in results.items()
        if any(result[key] != first[key] for key in ("fingerprint", "settings"))
    ]
    if not others:
        return []
    return [f"**Not alike.** {', '.join(others)}: another base, or other settings, than those above."]


def _map(result: Result) -> str:
    found = _cells(result)
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
        "The cells that end best on the search icons, and the paper's, with seeds of their own:\n\n"
    )
    picture = FOLDER / MAP_PICTURE
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
    "adapters": ("Rival adapters", _adapters),
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


def _cells(result: Result) -> dict[tuple[str, float], Result]:
    by_arm = {pair["arm"]: pair for pair in result["map"]}
    return {cell: by_arm[key] for cell, key in CELL_KEYS.items()}


def _mean(result: Result, arm: str, metric: str) -> float:
    return statistics.fmean(row[metric] for row in result["rows"] if row["arm"] == arm)


def _not_run(part: str) -> str:
    return f"*Not run yet: `python -m benchmarks.paper_variants --work FOLDER --parts {part}` does.*"


if __name__ == "__main__":
    main()
