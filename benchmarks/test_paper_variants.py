"""The study of where flatness pays, on made-up figures: what it chooses and says."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks.paper_variants import parser
from benchmarks.paper_variants_answer import answer, headline_table
from benchmarks.paper_variants_figures import (
    HEADLINES,
    METRICS,
    Result,
    Row,
    chosen_cells,
    chosen_point,
    compared,
    corrected,
    headline_rows,
)
from benchmarks.paper_variants_page import draw_figure, page
from benchmarks.paper_variants_parts import PARTS
from benchmarks.paper_variants_plan import (
    CELL_KEYS,
    FULL,
    IID,
    PAPER,
    STRONG,
    THIN,
    TRIAL_SEED,
    Group,
    half,
)
from benchmarks.paper_variants_rivals import adapter_choices, adapter_pairs, method_choices, method_pairs
from benchmarks.paper_variants_study import Study
from benchmarks.paper_words import MINUS
from flatlora_diffusion.compare.arms import parse_arm, plan
from flatlora_diffusion.config import TrainConfig

RATE = 5e-4
BASE = {"train": 0.10, "search": 0.10, "report": 0.10, "flat": 0.05}


# What is chosen and compared.


def row(arm: str, seed: int, **figures: Any) -> Row:
    points = [{"step": 50, "seconds": 1.0, "train": 0.09, "search": 0.08, "report": 0.08}]
    points.append({"step": 100, "seconds": 2.0, "train": 0.08, "search": figures.pop("search", 0.09), "report": 0.07})
    whole = {key: 0.05 for key in METRICS if key != "equal_loss"}
    return {"arm": arm, "seed": seed, "draws": f"{seed}", "points": points, "label": ""} | whole | figures


def test_the_checkpoint_is_chosen_by_the_search_icons() -> None:
    points = [
        {"step": 50, "search": 0.3, "report": 0.1},
        {"step": 100, "search": 0.2, "report": 0.3},
        {"step": 150, "search": 0.25, "report": 0.2},
    ]
    assert chosen_point(points)["step"] == 100


def test_the_cells_that_get_more_seeds_are_those_that_the_search_icons_like_and_the_papers() -> None:
    keys = list(CELL_KEYS.values())
    rows = [row("lora", 50, search=0.0)]
    # What is reported says the opposite.
    rows += [row(key, 50, search=0.1 - 0.001 * place, report=place) for place, key in enumerate(keys)]
    assert chosen_cells(rows, 4) == [*keys[:-4:-1], PAPER]


def test_differences_are_paired_by_seed_and_told_from_draws_that_differ() -> None:
    rows = [row("lora", seed, report=0.05 + seed) for seed in (0, 1, 2)]
    rows += [row(STRONG, seed, report=0.04 + seed) for seed in (0, 1)]
    rows[-1]["draws"] = "others"
    (pair,) = compared(rows, {STRONG: "lora"}, BASE)
    assert pair["seeds"] == [0, 1]
    assert pair["alike"] == 1
    assert pair["report"]["mean"] == pytest.approx(-0.01)
    assert pair["equal_loss"]["mean"] == 0


def test_headline_intervals_hold_together() -> None:
    values = [0.1, 0.2, 0.4, 0.1, 0.3]
    found = corrected({"differences": values, "mean": 0.22, "low": 0.0, "high": 1.0})
    level = 1 - 0.05 / len(HEADLINES)
    low, high = stats.t.interval(level, 4, loc=0.22, scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high))


class MadeUpStudy(Study):
    """Its runs have made-up figures."""

    def __init__(self, *arguments: str) -> None:
        self.options = parser().parse_args(["--work", "work", *arguments])

    def rows(self, group: Group) -> list[Row]:
        lower = {key: 0.001 * len(key) for key in group.arms}
        return [
            row(key, seed, report=0.05 - less, search=0.09 - less)
            for seed in group.seeds
            for key, less in lower.items()
        ]

    def bench(self, group: Group) -> Any:
        config = TrainConfig().replace(max_train_steps=3)
        return argparse.Namespace(
            base=lambda: BASE,
            cost=lambda planned, reference: {},
            planned=lambda group: plan(config, [parse_arm(key) for key in group.arms], group.seeds, 1),
        )


def test_every_headline_is_found_in_the_result_of_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = {"lora": "lora:rank=2", "flat-lora": STRONG}
    monkeypatch.setattr(
        "benchmarks.paper_variants_parts.trial_group",
        lambda method, count: Group({trials[method]: trials[method]}, [TRIAL_SEED], trial=True),
    )
    monkeypatch.setattr("benchmarks.paper_variants_parts._draw_map", lambda *_: None)
    monkeypatch.setattr(
        "benchmarks.paper_variants_parts.stressed",
        lambda bench, group, base: [row(key, seed, stronger=0.1, nf4=0.1) for key in group.arms for seed in (0, 1)],
    )
    study = MadeUpStudy("--seeds", "2", "--fresh", "2")
    results = {part: PARTS[part](study) for part in dict.fromkeys(headline.part for headline in HEADLINES)}
    found = headline_rows(results)
    assert [(one["part"], one["name"], one["metric"]) for one in found] == [tuple(one) for one in HEADLINES]
    labels = ["rank 1", "rank 16", "5 images", "10 images", "150 steps", "600 steps"]
    assert [pair["label"] for pair in PARTS["sizes"](study)["pairs"]] == labels
    for part, choices, pairs_of in (
        ("methods", method_choices(RATE), method_pairs),
        ("adapters", adapter_choices(RATE), adapter_pairs),
    ):
        chosen = {name: max(arms, key=len) for name, arms in choices.items()}  # whose made-up loss is lowest
        assert PARTS[part](study)["cost"].keys() == {*pairs_of(chosen), chosen["lora"]}


# What the page says.


def test_the_page_of_nothing_says_how_to_run_each_part() -> None:
    text = page({})
    for part in PARTS:
        assert f"--parts {part}` does" in text
    assert "was not measured yet" in text


def test_the_answer_is_three_sentences_made_of_the_figures_and_one_on_their_intervals() -> None:
    results = made_up_results()
    said = answer(results)
    assert said.replace("Eq. 7", "").count(". ") == 3
    assert said.endswith(
        "corrected for 12 comparisons, so that all hold together with 95 %, where nothing else is said."
    )
    assert f"{MINUS}990.0" in said
    assert "(better)" in said
    results["tuned"]["pairs"] = compared(rows_of(STRONG, "lora", report=0.07), {STRONG: "lora"}, BASE)
    assert "(worse)" in answer(results).split(". ")[0]
    assert "(better)" not in answer(results).split(". ")[0]


def test_the_page_shows_every_part_with_its_numbers(tmp_path: Path) -> None:
    results = made_up_results()
    text = page(results)
    assert "Not run yet" not in text
    assert f"{len(HEADLINES)} of {len(HEADLINES)} were run" in headline_table(results)
    assert "base in int8" in text
    assert "| rank 1 | 3 |" in text
    assert "| SAM | LoRA | 50% | 0.75 | 3 |" in text
    assert "1.00 (0.90 to 1.10) | 2.0 |" in text  # time and MiB of LoRA
    first = text.partition("## What is simpler")[2].partition("##")[0]
    assert "at equal clean loss" in first
    for pair in results["controls"]["pairs"]:
        del pair["equal_loss"]
    assert "at equal clean loss" not in page(results).partition("## What is simpler")[2].partition("##")[0]
    draw_figure(results["map"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert "Not alike" not in text
    assert "**Not alike.** felt: another base" in page(results | {"felt": {**results["felt"], "fingerprint": "1"}})
    worse = copy.deepcopy(results)
    for pair in worse["controls"]["pairs"]:
        pair["report"] |= {"mean": 0.01, "low": 0.005, "high": 0.015, "differences": [0.01, 0.011, 0.012]}
    assert "worse" in page(worse).split("## What is simpler")[1].split("##")[0]


def rows_of(arm: str, against: str, **figures: float) -> list[Row]:
    """Three seeds of each, the arm's with these figures."""
    changed = [row(arm, seed, **{key: value + 1e-4 * seed for key, value in figures.items()}) for seed in range(3)]
    return [*(row(against, seed) for seed in range(3)), *changed]


def made_up_results() -> dict[str, Result]:
    """Every part's JSON, in which the arm of a headline has a loss of 0.01 less."""
    cells = [made for key in CELL_KEYS.values() for made in rows_of(key, "lora", report=0.04)]
    pairs_of = {
        "map": {"best cell": [STRONG, "lora"]},
        "tuned": {"both tuned": [STRONG, "lora"]},
        "draws": {"Eq. 7 less iid": [FULL, IID], "thin less full draws": [THIN, FULL]},
        "controls": {"against the best control": [STRONG, half(RATE)]},
        "methods": {"against Bi-LoRA": [STRONG, "bi-lora"]},
        "sam": {"SAM": ["sam", "lora"]},
        "preset": {"": ["sam", "lora"]},
        "again": {"at strength 1.5": [STRONG, "lora"], "on a base in NF4": [STRONG, "lora"]},
        "domain": {"": [STRONG, "lora"]},
    }
    results: dict[str, Result] = {}
    for part, named in pairs_of.items():
        rows = [made for arm, against in named.values() for made in rows_of(arm, against, report=0.04)]
        pairs = [found for arm, against in named.values() for found in compared(rows, {arm: against}, BASE)]
        results[part] = {"base": BASE, "rows": rows, "pairs": pairs, "headlines": named}
    results["preset"] |= {"preset": "quality", "of_preset": {"rank": 16}}
    results["map"] |= {"map": compared(cells, dict.fromkeys(CELL_KEYS.values(), "lora"), BASE)}
    results["tuned"] |= {"trials": {name: [{"arm": name, "search": 0.1}] * 3 for name in ("lora", "flat-lora")}}
    results["sizes"] = {"pairs": compared(rows_of(STRONG, "lora", report=0.04), {STRONG: "lora"}, BASE, "rank 1")}
    results["methods"]["rows"] += [row("lora", seed) for seed in range(3)]
    results["methods"] |= {"cost": {"lora": {"ratio": [0.9, 1.0, 1.1], "peak_bytes": 2 * 2**20}}}
    results["adapters"] = results["methods"]
    results["sam"] |= {"trials": {"sam": [{"arm": "sam", "search": 0.1}]}}
    difference = results["map"]["pairs"][0]["report"]
    felt = {"base in int8": {"report": difference, "flat": difference}}
    results["felt"] = {"felt": [{"arm": STRONG, "against": "lora", "conditions": felt}]}
    equal = {"arm": "sam", "against": "lora", "share": 0.5, "strength": 0.75, "seeds": [0, 1, 2], "report": difference}
    results["forgetting"] = {"equal": [equal]}
    settings = {"max_train_steps": 300, "train_batch_size": 2, "rank": 4, "learning_rate": RATE}
    shared = {
        "fingerprint": "0",
        "settings": settings,
        "versions": {"torch": "2"},
        "date": "today",
        "device": "made up",
    }
    return {part: shared | result for part, result in results.items()}
