"""What the README tells of the demo is what its file says, and the file is made of the demo's own report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo_figures import FILE, FLAT, LORA, README, SAM, cost, filled, of_report, sentences, table
from flatlora_diffusion.commands.command_line import DEMO_ARMS
from flatlora_diffusion.compare.page.page import RESULT

ARMS = (LORA, FLAT, SAM)


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def test_the_readme_has_the_table_and_the_sentences_of_the_file() -> None:
    readme, result = README.read_text(encoding="utf-8"), committed()
    assert filled(readme, result) == readme, "run `python -m benchmarks.demo_figures`"
    assert f"\n{table(result)}\n\n" in readme
    said = " ".join(readme.split())
    for sentence in sentences(result):
        assert sentence in said


def test_what_the_readme_says_of_all_three_is_so() -> None:
    result = committed()
    base = result["base"]
    lora, flat, sam = (result["values"][arm]["0"] for arm in ARMS)
    assert result["seeds"] == [0]
    for found in (lora, flat, sam):
        assert found["heldout_loss"] < base["heldout_loss"]
        assert found["forgetting_loss"] > base["forgetting_loss"]
        assert found["diversity"] < base["diversity"]
        assert found["memorization"] > base["memorization"]
        assert found["heldout_similarity"] > base["heldout_similarity"]
    assert sam["forgetting_loss"] == max(found["forgetting_loss"] for found in (lora, flat, sam))
    assert all(result["advice"][arm]["over_fit"] for arm in ARMS)
    assert [arm.partition(":")[0] for arm in ARMS] == list(DEMO_ARMS)


def test_the_table_is_written_anew_and_all_else_is_left() -> None:
    result = committed()
    result["base"]["heldout_loss"] = 0.5
    before = README.read_text(encoding="utf-8").splitlines()
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
    assert result["advice"][SAM] == {"checkpoint": 38, "over_fit": True}
    with_cost = {**result, "cost": {FLAT: [1.0, 1.1, 1.2], SAM: [1.7, 1.8, 1.9]}}
    assert table(with_cost).splitlines()[2:] == ["| held-out loss ↓ | 0.10000 | 0.10000 | 0.10000 | 0.10000 |"]
    with_cost["metrics"].append({"key": "seconds_per_step", "name": "", "better": "lower", "digits": 3})
    assert table(with_cost).splitlines()[3] == "| time of a step, LoRA's = 1 ↓ |  | 1.00 | 1.10 | 1.80 |"


@pytest.mark.slow  # a few steps of the demo's own trainings
def test_the_cost_is_measured_on_the_arms_of_the_demo_in_turns() -> None:
    found = cost(0.0)
    assert found["turns"] == 2
    assert all(0 < found[arm][0] <= found[arm][1] <= found[arm][2] for arm in (FLAT, SAM))
