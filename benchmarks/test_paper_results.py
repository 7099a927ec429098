"""The pages of the paper's tables are what their commands write, and say what the figures say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper_results, paper_text_to_image_page, paper_variants_page, paper_vision
from benchmarks.paper_results import answer, draw_figure, page, read
from benchmarks.paper_results_studies import STUDIES, points, pooled, told
from benchmarks.paper_study import _bouts
from benchmarks.paper_study_arms import ARMS, CONSTANT_SIGMAS, RANKS, SIGMAS, SWEEPS, VARIANT_ARMS, Arm
from benchmarks.paper_study_settings import Settings
from benchmarks.paper_variants_page import read_results
from benchmarks.paper_words import MINUS
from flatlora_diffusion.compare.paired import paired_difference

METRICS = ["test", "shifted", "3d", "rise", "seconds", *(f"severity {number}" for number in range(1, 6))]
GAINS = {"flat": 0.010, "iid": 0.004, "dropout": 0.025, "flat dora": 0.03}
SEEDS = (-0.001, 0.0, 0.001)


def made_up(sweeps: list[str]) -> dict[str, Any]:
    """A task on which each arm has LoRA's 80 % and its gain, more or less by seed."""
    arms: dict[str, Arm] = {**ARMS, **VARIANT_ARMS}
    rows = {}
    for bout in _bouts(dict.fromkeys(arms, Settings(lr=1e-3, steps=2)), arms, sweeps):
        gain = GAINS.get(bout.arm, 0.0)
        difference = asdict(paired_difference([0.8 + gain + more for more in SEEDS], [0.8] * len(SEEDS)))
        rows[bout.arm] = {
            "against": bout.against,
            "mean": dict.fromkeys(METRICS, 0.8 + gain),
            "difference": dict.fromkeys(METRICS, difference),
        }
    return rows


def found() -> paper_results.Found:
    made_by = {"batch": 16, "date": "2026-11-27", "device": "a processor", "versions": {"torch": "2.13.0"}}
    names, plain = list(SWEEPS), made_up([])
    sizes = {"class_count": 4, "train": 480, "validation": 200, "test": 300, "tags": 299}
    figures = [
        {"name": name, "rises": {"filter": [{"values": [rise, rise + 0.01]}]}}
        for name, rise in {"LoRA": 0.05, "Flat-LoRA": 0.04}.items()
    ]
    surface = {
        "task": "tweets",
        "seed": 0,
        "rows": 64,
        "runs": {"LoRA": {}, "Flat-LoRA": {"sigma": 0.4}},
        "settings": {"sigmas": [0.1], "rise_draws": 2},
        "losses": {"LoRA": 0.5, "Flat-LoRA": 0.6},
        "figures": figures,
    }
    return {
        "surface_language": surface,
        "language": {
            **made_by,
            "tasks": {"emoji": {"sizes": sizes, "how": {"trials": 3, "seeds": 5, "steps": 60, "lr_factor": 2.5}}},
            "tables": {"emoji": made_up(names), "tweets": plain},
        },
        "vision": {**made_by, "tables": {"digits": made_up(names)}},
    }


def test_docs_have_what_the_commands_write() -> None:
    assert paper_results.PAGE.read_text(encoding="utf-8") == page(read()), "run `python -m benchmarks.paper_results`"
    images = paper_text_to_image_page.PAGE.read_text(encoding="utf-8")
    assert images == paper_text_to_image_page.page(), "run `python -m benchmarks.paper_text_to_image_page`"
    variants = paper_variants_page.page(read_results(), paper_variants_page.read_shapes())
    assert paper_variants_page.PAGE.read_text(encoding="utf-8") == variants, (
        "run `python -m benchmarks.paper_variants_page`"
    )


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_three_tasks_with_every_arm_and_five_seeds(name: str) -> None:
    tables = read()[name]["tables"]
    assert len(tables) >= 3
    sweeps = {"language": RANKS, "vision": paper_vision.RANKS}
    swept = {f"{kind}rank {rank}" for kind in ("", "flat ") for rank in sweeps[name]}
    swept |= {f"sigma {sigma} cosine" for sigma in SIGMAS} | {f"sigma {sigma} constant" for sigma in CONSTANT_SIGMAS}
    for arms in tables.values():
        assert arms.keys() >= {*ARMS, *VARIANT_ARMS, *swept}
        assert {len(arm["difference"]["shifted"]["differences"]) for arm in arms.values()} == {5}


def test_the_answer_has_the_means_of_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_results, "read_results", dict)
    first, _, third = answer(found()).splitlines()
    assert first.startswith("On 2 tasks with MiniLM-L6")
    assert "+1.00 [+0.75, +1.25] points in domain (better on 2, worse on 0)" in first
    assert "Eq. 7's noise less iid noise of equal energy is +0.60" in third  # 1.0 less 0.4
    assert "LoRA dropout has the most over LoRA, +2.50 [+1.87, +3.13], corrected" in third


def test_every_section_is_filled_by_the_study_that_it_speaks_of() -> None:
    text = page(found())
    assert text.count("Not run yet") == 2  # memory, and the icons
    assert "| 3 | 5 | 60 | 2.5 |" in text
    assert "| here, emoji, in domain | 8 | 80.00 | 81.00 | +1.00 [+0.75, +1.25] |" in text
    assert "| here, digits, shifted | 16, rates of 8 |" in text
    assert "| here, tweets, in domain | 16" not in text, "it has no sweep of ranks"
    assert text.count("| flat dora, less dora | +3.00 [+2.75, +3.25] |") == 4
    assert "| emoji | 4 | 480 | 200 | 300 | tags 299 | 3 | 5 | 60 |" in text
    assert "`python -m benchmarks.paper_language`: 16 examples a step; 2026-11-27" in text
    assert "| flat dora, less dora | +30.00 [+27.52, +32.48] |" in text, "the rise of the loss, in thousandths"
    assert "| 0.5 | +0.00 [" in text.partition("By rho")[2]
    assert "MiniLM-L6 on tweets, LoRA and Flat-LoRA of seed 0, each as tuned (sigma 0.4)" in text
    assert f"| mean rise under eps, sigma 0.1 | 0.0550 | 0.0450 | {MINUS}0.0100 |" in text
    assert "| 5 | +3.56 | +1.00 [+0.75, +1.25] |" in text
    assert "| 16 |" in text.partition("## Figure 5")[2]


def test_pages_without_a_study_say_how_to_run_it() -> None:
    text = page({})
    assert "*Not run yet: `python -m benchmarks.paper_language` does.*" in text
    assert "![" not in text.partition("## Figure 6")[0], "there is no figure to show"


def test_differences_are_paired_by_seed_over_the_tasks_that_have_the_arm() -> None:
    tables = found()["language"]["tables"]
    assert pooled(tables, "flat", "test", against="iid")["differences"] == pytest.approx([0.006] * 3)
    assert len(pooled(tables, "flat rank 16", "test")["differences"]) == len(SEEDS), "of the one task that has it"
    assert told(tables, "flat", "test") == (2, 0)
    assert told(tables, "sam", "test") == (0, 0)
    assert points({"mean": -0.0123, "low": None, "high": None}) == f"{MINUS}1.23"


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    draw_figure(found(), tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 20_000
