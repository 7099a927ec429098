"""What did `paper_text_to_image` find? Makes docs/results.md of its figures and of those of `flatness`.

    python -m benchmarks.paper_results

Reads benchmarks/paper_text_to_image.json and benchmarks/paper_flatness.json (the flatness.json of the runs of rank 1
and 16); every number of the page comes from there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_text_to_image import RESULT, TRIALS
from flatlora_diffusion.matched import Point, at_equal_loss, at_equal_seconds
from flatlora_diffusion.paired import paired_difference

FLATNESS = Path(__file__).with_name("paper_flatness.json")
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
SCALE = 1e5  # losses differ in the fifth decimal
UNIT = "in 10⁻⁵"
MINUS = "\N{MINUS SIGN}"

Result = dict[str, Any]


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    flatness = json.loads(FLATNESS.read_text(encoding="utf-8"))
    parts = [
        _head(result),
        _factors(result),
        _matched(result),
        _groups(result),
        _nulls(result),
        _tuned(result),
        _flatness(flatness),
    ]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(PAGE)


def summary(result: Result) -> str:
    """What the intervals say, in a sentence."""
    center, tuned = result["pairs"][0]["report"], result["tuned"]["report"]
    found = [pair for pair in result["pairs"] if _side(pair["report"])]
    better = [_name(pair["arm"]) for pair in found if pair["report"]["high"] < 0]
    worse = [_name(pair["arm"]) for pair in found if pair["report"]["low"] > 0]
    base, lora = result["base"]["report"]["all"], _mean(result, "lora")
    return (
        f"On {result['icons']['report']} icons never trained on, Flat-LoRA's loss at the paper's settings differs "
        f"from LoRA's by {_interval(center)} ({UNIT}; LoRA itself gains {SCALE * (base - lora):.1f} over the base), "
        f"over {center['n']} paired seeds. Of {len(result['pairs'])} settings {len(better)} came out better than LoRA "
        f"({', '.join(better) or 'none'}) and {len(worse)} worse ({', '.join(worse) or 'none'}). With both methods "
        f"tuned by {TRIALS} trials each, the difference is {_interval(tuned)}: {_words(tuned)}."
    )


def _head(result: Result) -> str:
    settings, icons = result["settings"], result["icons"]
    return f"""# Does Flat-LoRA generalize better here?

{summary(result)}

Made by `python -m benchmarks.paper_text_to_image --work FOLDER`, then `python -m benchmarks.paper_results`;
{result["date"]}, {result["machine"]}, torch {result["versions"]["torch"]}, fp32. All figures:
`benchmarks/paper_text_to_image.json`.

**What was trained.** The tiny base on the {icons["train"]} icons, {settings["max_train_steps"]} steps of batch \
{settings["train_batch_size"]}, learning rate {settings["learning_rate"]}, rank {settings["rank"]}, sigma 0.1 with the
cosine ramp; then one factor at a time. A Flat-LoRA and the LoRA it is paired with share the base, the first weights
and every image, crop, noise and timestep: {_proved(result)}.

**What was measured.** The denoising loss, without eps, at fixed noise and timesteps, on three lists of 3D icons that
share no icon and no word with the training icons: {icons["search"]} to choose settings, {icons["checkpoint"]} to
choose checkpoints, {icons["report"]} for this page; and on {icons["flat"]} flat icons that the base was trained on
(forgetting). Lower is better. Differences are Flat-LoRA less LoRA, with the 95 % interval of Student's t over paired
seeds; “could show” is the smallest true difference that so many seeds find with 80 % power. An interval that holds 0
shows nothing. A small base with 64-pixel icons is no SDXL: what holds here need not hold there, either way."""


def _factors(result: Result) -> str:
    rows = [
        [
            _name(pair["arm"]),
            _name(pair["against"]),
            *(_interval(pair[key]) for key in ("report", "chosen")),
            _number(pair["report"]["detectable"]),
            _words(pair["report"]),
            *(_interval(pair[key]) for key in ("train", "flat", "rise")),
        ]
        for pair in result["pairs"]
    ]
    columns = ["arm", "against", "held-out, at the end", "held-out, chosen checkpoint", "could show", "says"]
    columns += ["clean train", "flat icons", "loss rise, sigma 0.1"]
    table = _table(columns, rows)
    base = result["base"]
    losses = _table(
        ["", "held-out", "clean train", "flat icons", "loss rise"],
        [
            ["Base", *(f"{base[key]['all']:.5f}" for key in ("report", "train", "flat")), ""],
            *([_name(arm), *_losses(result, arm)] for arm in dict.fromkeys(run["arm"] for run in result["runs"])),
        ],
    )
    return f"## One factor at a time\n\nDifferences {UNIT}:\n\n{table}\n\nMean losses over seeds:\n\n{losses}"


def _matched(result: Result) -> str:
    rows = []
    for pair in result["pairs"]:
        walks = [
            (_walk(result, pair["arm"], seed), _walk(result, pair["against"], seed)) for seed in _seeds(result, pair)
        ]
        cells = []
        for match in (at_equal_loss, at_equal_seconds):
            ones, others = zip(*(match(*walk) for walk in walks), strict=True)
            found = paired_difference(ones, others)
            cells.append(_interval({"mean": found.mean, "low": found.low, "high": found.high}))
        rows.append([_name(pair["arm"]), *cells])
    text = "Held-out loss on the checkpoint list, interpolated between checkpoints"
    return f"## At equal clean loss, at equal seconds\n\n{text}, differences {UNIT}:\n\n" + _table(
        ["arm", "at equal clean train loss", "at equal seconds"], rows
    )


def _groups(result: Result) -> str:
    groups = result["pairs"][0]["groups"]
    rows = [[group, _interval(found), _words(found)] for group, found in groups.items()]
    return f"## By kind of thing\n\nFlat-LoRA less LoRA at the paper's settings, {UNIT}:\n\n" + _table(
        ["concepts", "difference", "says"], rows
    )


def _nulls(result: Result) -> str:
    says = {
        "sigma-0": "Flat-LoRA at sigma 0 less LoRA: the same method, so exactly 0",
        "other-draws": "LoRA with other draws from the same first weights: chance alone",
        "second-eps": "Flat-LoRA with another seed of eps: chance in the noise alone",
    }
    rows = [[says[key], f"{SCALE * found['report']:+.2f}"] for key, found in result["nulls"].items()]
    return f"## Nulls\n\nDifference of the held-out loss, one seed, {UNIT}:\n\n" + _table(["what", "difference"], rows)


def _tuned(result: Result) -> str:
    trials = [
        [_name(trial["arm"]), f"{trial['search']:.5f}"] for found in result["trials"].values() for trial in found
    ]
    tuned = result["tuned"]
    return (
        f"## Both tuned\n\n{TRIALS} settings of each method, drawn from its own grid, one seed each, judged on the "
        f"search list:\n\n{_table(['tried', 'loss, search list'], trials)}\n\nThe best of each, trained anew with "
        f"{tuned['report']['n']} other seeds: {_name(tuned['arm'])} less {_name(tuned['against'])}, held-out "
        f"{_interval(tuned['report'])} {UNIT} (could show {_number(tuned['report']['detectable'])}): "
        f"{_words(tuned['report'])}. These two differ in more than sigma, so this says which recipe to use, "
        "not what the noise does."
    )


def _flatness(flatness: Result) -> str:
    arms = flatness["figures"]
    rows = [["loss, training images", *(f"{arm['losses']['train']:.5f}" for arm in arms)]]
    for kind, words in (("filter", "Eq. 7"), ("iid", "iid")):
        for place, sigma in enumerate(flatness["settings"]["sigmas"]):
            rows.append(
                [f"expected rise, {words}, sigma {sigma:g}", *(_estimate(arm["rises"][kind][place]) for arm in arms)]
            )
    for place, radius in enumerate(flatness["settings"]["radii"]):
        rows.append([f"worst-case rise, radius {radius:g}", *(f"{arm['worst'][place]:.2e}" for arm in arms)])
    for metric, words in (("filter", "filter-normalized"), ("raw", "raw")):
        if all(metric in arm["curvature"] for arm in arms):
            found = [arm["curvature"][metric] for arm in arms]
            rows.append([f"largest eigenvalue, {words}", *(f"{one['eigenvalues'][0]['value']:.3e}" for one in found)])
            rows.append([f"trace, {words}", *(_estimate(one["trace"]) for one in found)])
    for name in ("LoRA in fp16", "LoRA in fp8", "LoRA in int8", "base in int8, LoRA whole", "LoRA cut to rank 1"):
        cells = [f"{arm['variants'][name]['train']:.5f}" if name in arm["variants"] else "" for arm in arms]
        rows.append([f"loss, {name}", *cells])
    columns = ["", *(_run_name(arm["name"]) for arm in arms)]
    return (
        "## Flatness, and the loss surface for rank 1 and 16\n\nMeasured at W' of the first seed of each arm "
        "(`python -m flatlora_diffusion flatness RUN…`), all weights that the LoRA adapts, common draws; ± is the "
        f"error over draws of the noise, not over trainings.\n\n{_table(columns, rows)}\n\n"
        "Loss over two random filter-normalized directions that all share (Li et al., arXiv:1712.09913), the analogue "
        "of the paper's Fig. 6:\n\n![Loss surfaces around W'](flatness_surface.png)\n\n"
        "![Expected rise of the loss by sigma](flatness_rise.png)"
    )


def _walk(result: Result, arm: str, seed: int) -> list[Point]:
    base = Point(0, 0.0, result["base"]["train"]["all"], result["base"]["checkpoint"]["all"])
    run = next(run for run in result["runs"] if (run["arm"], run["seed"]) == (arm, seed))
    points = run["points"]
    return [base, *(Point(one["step"], one["seconds"], one["train"], one["checkpoint"]) for one in points)]


def _seeds(result: Result, pair: Result) -> list[int]:
    return sorted(run["seed"] for run in result["runs"] if run["arm"] == pair["arm"])


def _losses(result: Result, arm: str) -> list[str]:
    runs = [run for run in result["runs"] if run["arm"] == arm]
    found = [
        [run["report"]["all"] for run in runs],
        [run["points"][-1]["train"] for run in runs],
        [run["flat"]["all"] for run in runs],
        [run["rise"] for run in runs],
    ]
    return [f"{sum(values) / len(values):.5f}" for values in found]


def _mean(result: Result, arm: str) -> float:
    losses = [run["report"]["all"] for run in result["runs"] if run["arm"] == arm]
    return float(sum(losses) / len(losses))


def _proved(result: Result) -> str:
    """How many pairs of runs have equal hashes of base, first weights and the draws of every tenth of the steps."""
    runs = {(run["arm"], run["seed"]): run for run in result["runs"]}
    pairs = [
        (runs[pair["arm"], seed], runs[pair["against"], seed])
        for pair in result["pairs"]
        for seed in _seeds(result, pair)
    ]
    alike = sum(one["start"] == other["start"] and one["draws"] == other["draws"] for one, other in pairs)
    return f"{alike} of {len(pairs)} pairs have equal hashes"


def _side(found: Result) -> bool:
    return bool(found["low"] > 0 or found["high"] < 0)


def _words(found: Result) -> str:
    if not _side(found):
        return "no difference found"
    return "Flat-LoRA better" if found["high"] < 0 else "LoRA better"


def _interval(found: Result) -> str:
    mean, low, high = (SCALE * found[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", MINUS)


def _number(value: float) -> str:
    return f"{SCALE * value:.2f}"


def _estimate(found: Result) -> str:
    return f"{found['mean']:.2e} ± {found['error']:.0e}"


def _name(key: str) -> str:
    """An arm's key as it reads in a table."""
    method, _, changes = key.partition(":")
    words = {"lora": "LoRA", "flat-lora": "Flat-LoRA"}.get(method, method)
    return f"{words} ({changes.replace(',', ', ').replace('=', ' ')})" if changes else words


def _run_name(name: str) -> str:
    """`flat-lora-rank-1/seed-0` as it reads in a table."""
    arm = name.split("/")[0]
    return {"Base": "Base"}.get(
        arm, arm.replace("flat-lora", "Flat-LoRA").replace("lora-", "LoRA-").replace("-rank-", ", rank ")
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
