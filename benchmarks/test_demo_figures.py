"""What docs/demo.md says of the demo is what its file says, and the file is made of the demo's own report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo_figures import AVERAGE, FILE, FLAT, LORA, PAGE, cost, filled, of_report, sentences, table
from flatlora_diffusion.commands.command_line import DEMO_ARMS
from flatlora_diffusion.compare.page.page import RESULT

ARMS = (LORA, FLAT, AVERAGE)


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def test_the_page_has_the_table_and_the_sentences_of_the_file() -> None:
    page, result = PAGE.read_text(encoding="utf-8"), committed()
    assert filled(page, result) == page, "run `python -m benchmarks.demo_figures`"
    assert f"\n{table(result)}\n\n" in page
    said = " ".join(page.split())
    for sentence in sentences(result):
        assert sentence in said


def test_what_the_page_says_of_all_three_is_so() -> None:
    result = committed()
    base = result["base"]
    lora, flat, average = (result["values"][arm]["0"] for arm in ARMS)
    assert result["seeds"] == [0]
    for found in (lora, flat, average):
        assert found["heldout_loss"] < base["heldout_loss"]
        assert found["forgetting_loss"] > base["forgetting_loss"]
        assert found["diversity"] < base["diversity"]
        assert found["memorization"] > base["memorization"]
        assert found["heldout_similarity"] > base["heldout_similarity"]
    assert average["heldout_loss"] < min(lora["heldout_loss"], flat["heldout_loss"])
    assert average["forgetting_loss"] < min(lora["forgetting_loss"], flat["forgetting_loss"])
    assert [result["advice"][arm]["over_fit"] for arm in ARMS] == [True, True, False]
    assert ARMS == DEMO_ARMS


def test_the_table_is_written_anew_and_all_else_is_left() -> None:
    result = committed()
    result["base"]["heldout_loss"] = 0.5
    before = PAGE.read_text(encoding="utf-8").splitlines()
    after = filled("\n".join(before), result).splitlines()
    (changed,) = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed.startswith("| held-out loss ↓ | 0.50000 |")


def test_a_report_gives_the_figures_of_its_arms_and_no_nulls(tmp_path: Path) -> None:
    found = {"heldout_loss": 0.1, "seconds_per_step": 2.0}
    metric = {"key": "heldout_loss", "name": "held-out loss", "better": "lower", "help": "", "digits": 5}
    advice = {"seed": 0, "checkpoint": 38, "strength": 1.0, "over_fit": True, "why": ""}
    report = {
        "seeds": [0],
        "base": found,
        "metrics": [metric],
        "values": {arm: {"0": found} for arm in (*ARMS, "sigma-0")},
        "advice": [{"arm": arm, **advice} for arm in ARMS],
    }
    (tmp_path / RESULT).write_text(json.dumps(report))
    result = of_report(tmp_path / RESULT)
    assert set(result["values"]) == set(ARMS)
    assert result["advice"][AVERAGE] == {"checkpoint": 38, "over_fit": True}
    with_cost = {**result, "cost": {FLAT: [1.0, 1.1, 1.2]}}
    assert table(with_cost).splitlines()[2:] == ["| held-out loss ↓ | 0.10000 | 0.10000 | 0.10000 | 0.10000 |"]
    with_cost["metrics"].append({"key": "seconds_per_step", "name": "", "better": "lower", "digits": 3})
    assert table(with_cost).splitlines()[3] == "| time of the training, LoRA's = 1 ↓ |  | 1.00 | 1.10 | 3.00 |"


@pytest.mark.long  # a few steps of the demo's own trainings
def test_the_cost_is_measured_on_the_arms_of_the_demo_in_turns() -> None:
    found = cost(0.0)
    assert found["turns"] == 2
    assert 0 < found[FLAT][0] <= found[FLAT][1] <= found[FLAT][2]
