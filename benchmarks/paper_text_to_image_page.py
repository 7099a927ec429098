"""What did `paper_text_to_image` find? Makes docs/images.md of its figures and of those of `flatness`.

    python -m benchmarks.paper_text_to_image_page

Reads benchmarks/paper_text_to_image.json and benchmarks/paper_flatness.json (the flatness.json of the runs of rank 1
and 16); every number of the page comes from there.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper_flatness import flatness_section, table
from benchmarks.paper_words import MINUS, SCALE, UNIT, interval, is_told
from flatlora_diffusion.compare.paired import paired_difference
from flatlora_diffusion.compare.trajectory import TrajectoryPoint, at_equal_loss, at_equal_seconds
from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.ground.numbers import NOTHING
from flatlora_diffusion.ground.provenance import base_fingerprint
from flatlora_diffusion.sdxl.pipeline import load_sdxl

RESULT = Path(__file__).with_name("paper_text_to_image.json")
FLATNESS = Path(__file__).with_name("paper_flatness.json")
PAGE = Path(__file__).parents[1] / "docs" / "images.md"

Result = dict[str, Any]


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def page() -> str:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    flatness = json.loads(FLATNESS.read_text(encoding="utf-8"))
    parts = [
        _head(result),
        _factors(result),
        _matched(result),
        _groups(result),
        _nulls(result),
        _tuned(result),
        flatness_section(flatness),
    ]
    return "\n\n".join(parts) + "\n"


def in_short(result: Result) -> str:
    """Where the paper's sigma ends, in a sentence."""
    pair = result["pairs"][0]["report"]
    gain = result["base"]["report"]["all"] - _mean(result, "lora")
    return (
        f"over {pair['n']} paired seeds Flat-LoRA with sigma 0.1 ends with a held-out loss that differs from "
        f"LoRA's by {interval(pair)} ({UNIT}), {-pair['mean'] / gain:.1%} of what LoRA gains over the base: "
        f"{_words(pair)}."
    )


def summary(result: Result) -> str:
    """What the intervals say, in a few sentences."""
    pair, tuned = result["pairs"][0], result["tuned"]["report"]
    better = [one for one in result["pairs"] if is_told(one["report"]) and one["report"]["high"] < 0]
    worse = [one for one in result["pairs"] if is_told(one["report"]) and one["report"]["low"] > 0]
    noise = _difference(result, "flat-lora", "flat-lora:perturb_noise=iid")
    stopped = _mean(result, "lora") - _mean(result, "lora", chosen=True)
    trials = len(result["trials"]["lora"])
    sentences = (
        f"On {result['icons']['report']} icons never trained on, {in_short(result)}",
        f"The clean training loss differs by {interval(pair['train'])}.",
        f"At the checkpoint that other icons choose, the held-out difference is {interval(pair['chosen'])}:",
        f"{_words(pair['chosen'])}; to stop LoRA there gains {SCALE * stopped:.1f}.",
        f"Eq. 7's noise less iid noise of equal energy: {interval(noise)}, {_words(noise)}.",
        f"Of {len(result['pairs'])} settings {len(better)} ended better than LoRA and {len(worse)} worse.",
        f"With both methods tuned by {trials} trials each, the difference is {interval(tuned)}: {_words(tuned)}.",
        "Intervals are 95 % each, not corrected for their number.",
    )
    return "\n".join(sentences)


def _head(result: Result) -> str:
    settings, icons = result["settings"], result["icons"]
    return f"""# Does Flat-LoRA generalize better here?

{summary(result)}

Made by `python -m benchmarks.paper_text_to_image --work FOLDER`, then
`python -m benchmarks.paper_text_to_image_page`;
{result["date"]}, {result["machine"]}, torch {result["versions"]["torch"]}, fp32. All figures:
`benchmarks/paper_text_to_image.json`.{_base(result)}

**What was trained.** The tiny base on the {icons["train"]} icons, {settings["max_train_steps"]} steps of batch \
{settings["train_batch_size"]}, learning rate {settings["learning_rate"]}, rank {settings["rank"]}, sigma 0.1 with the
cosine ramp, full draws with the norms of each step; then one factor at a time. A Flat-LoRA and the LoRA it is paired
with share the base, the first weights and every image, crop, noise and timestep: {_proved(result)}.

**What was measured.** The denoising loss, without eps, at fixed noise and timesteps, on three lists of 3D icons that
share no icon and no word with the training icons: {icons["search"]} to choose settings, {icons["checkpoint"]} to
choose checkpoints, {icons["report"]} for this page; and on {icons["flat"]} flat icons that the base was trained on
(forgetting). Lower is better. Differences are Flat-LoRA less LoRA, with the 95 % interval of Student's t over paired
seeds; “could show” is the smallest true difference that so many seeds find with 80 % power. An interval that holds 0
shows nothing. A small base with 64-pixel icons is no SDXL: what holds here need not hold there, either way."""


def _base(result: Result) -> str:
    """A paragraph for runs on another base than the one that ships."""
    shipped = base_fingerprint(load_sdxl(ModelConfig(), torch.device("cpu"), torch.float32).unet)
    trained = {run["start"]["base"] for run in result["runs"]}
    if trained == {shipped}:
        return ""
    return """

**An earlier base.** These runs were not repeated on the tiny base that ships now, which was trained further; on that
one the figures will differ."""


def _factors(result: Result) -> str:
    rows = [
        [
            _name(pair["arm"]),
            _name(pair["against"]),
            *(interval(pair[key]) for key in ("report", "chosen")),
            _number(pair["report"]["detectable"]),
            _words(pair["report"]),
            *(interval(pair[key]) for key in ("train", "flat", "rise")),
        ]
        for pair in result["pairs"]
    ]
    columns = ["arm", "against", "held-out, at the end", "held-out, chosen checkpoint", "could show", "says"]
    columns += ["clean train", "flat icons", "loss rise, sigma 0.1"]
    differences = table(columns, rows)
    base = result["base"]
    arms = dict.fromkeys(run["arm"] for run in result["runs"] if run["arm"] not in result["nulls"])
    losses = table(
        ["", "held-out, at the end", "held-out, chosen checkpoint", "its step", "clean train", "flat icons"],
        [
            [
                "Base",
                f"{base['report']['all']:.5f}",
                "",
                "",
                *(f"{base[key]['all']:.5f}" for key in ("train", "flat")),
            ],
            *([_name(arm), *_losses(result, arm)] for arm in arms),
        ],
    )
    return f"## One factor at a time\n\nDifferences {UNIT}:\n\n{differences}\n\nMean losses over seeds:\n\n{losses}"


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
            cells.append(interval({"mean": found.mean, "low": found.low, "high": found.high}))
        rows.append([_name(pair["arm"]), *cells])
    text = "Held-out loss on the checkpoint list, interpolated between checkpoints"
    return f"## At equal clean loss, at equal seconds\n\n{text}, differences {UNIT}:\n\n" + table(
        ["arm", "at equal clean train loss", "at equal seconds"], rows
    )


def _groups(result: Result) -> str:
    groups = result["pairs"][0]["groups"]
    rows = [[group, interval(found), _words(found)] for group, found in groups.items()]
    return f"## By kind of thing\n\nFlat-LoRA less LoRA with sigma 0.1, {UNIT}:\n\n" + table(
        ["concepts", "difference", "says"], rows
    )


def _nulls(result: Result) -> str:
    says = {
        "sigma-0": "Flat-LoRA at sigma 0 less LoRA: the same method, so exactly 0",
        "other-draws": "LoRA with other draws from the same first weights: chance alone",
        "second-eps": "Flat-LoRA with another seed of eps: chance in the noise alone",
    }
    rows = [
        [says[key], f"{SCALE * found['report']:+.2f}".replace("-", MINUS)] for key, found in result["nulls"].items()
    ]
    return f"## Nulls\n\nDifference of the held-out loss, one seed, {UNIT}:\n\n" + table(["what", "difference"], rows)


def _tuned(result: Result) -> str:
    trials = [
        [_name(trial["arm"]), f"{trial['search']:.5f}"] for found in result["trials"].values() for trial in found
    ]
    tuned = result["tuned"]
    return (
        f"## Both tuned\n\n{len(trials) // 2} settings of each method, drawn from its own grid, one seed each, judged "
        f"on the search list:\n\n{table(['tried', 'loss, search list'], trials)}\n\nThe best of each, trained anew "
        f"with {tuned['report']['n']} other seeds: {_name(tuned['arm'])} less {_name(tuned['against'])}, held-out "
        f"{interval(tuned['report'])} {UNIT} (could show {_number(tuned['report']['detectable'])}): "
        f"{_words(tuned['report'])}. These two differ in more than sigma, so this says which recipe to use, "
        "not what the noise does."
    )


def _walk(result: Result, arm: str, seed: int) -> list[TrajectoryPoint]:
    base = TrajectoryPoint(0, 0.0, result["base"]["train"]["all"], result["base"]["checkpoint"]["all"])
    run = next(run for run in result["runs"] if (run["arm"], run["seed"]) == (arm, seed))
    points = run["points"]
    return [base, *(TrajectoryPoint(one["step"], one["seconds"], one["train"], one["checkpoint"]) for one in points)]


def _seeds(result: Result, pair: Result) -> list[int]:
    return sorted(run["seed"] for run in result["runs"] if run["arm"] == pair["arm"])


def _losses(result: Result, arm: str) -> list[str]:
    runs = [run for run in result["runs"] if run["arm"] == arm]
    step = sum(run["chosen"]["step"] for run in runs) / len(runs)
    found = [
        [run["report"]["all"] for run in runs],
        [run["chosen"]["report"] for run in runs],
        [run["points"][-1]["train"] for run in runs],
        [run["flat"]["all"] for run in runs],
    ]
    end, chosen, train, flat = (f"{sum(values) / len(values):.5f}" for values in found)
    return [end, chosen, f"{step:.0f}", train, flat]


def _difference(result: Result, arm: str, against: str) -> Result:
    """The paired difference at the end of the run between any two arms."""
    losses = {(run["arm"], run["seed"]): run["report"]["all"] for run in result["runs"]}
    seeds = sorted(seed for key, seed in losses if key == arm)
    return asdict(paired_difference([losses[arm, seed] for seed in seeds], [losses[against, seed] for seed in seeds]))


def _mean(result: Result, arm: str, chosen: bool = False) -> float:
    runs = [run for run in result["runs"] if run["arm"] == arm]
    losses = [run["chosen"]["report"] if chosen else run["report"]["all"] for run in runs]
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


def _words(found: Result) -> str:
    if found["low"] is None:
        return "no interval"
    if not is_told(found):
        return "no difference found"
    return "Flat-LoRA better" if found["high"] < 0 else "LoRA better"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{SCALE * value:.2f}"


def _name(key: str) -> str:
    """An arm's key as it reads in a table."""
    method, _, changes = key.partition(":")
    words = {"lora": "LoRA", "flat-lora": "Flat-LoRA"}.get(method, method)
    return f"{words} ({changes.replace(',', ', ').replace('=', ' ')})" if changes else words


if __name__ == "__main__":
    main()
