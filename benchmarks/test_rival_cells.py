"""The record of all cells is whole, and a cell that has hardly trained anything is none of those that are right."""

from __future__ import annotations

import json

from benchmarks.rival_cells import OUT, Cell, cells, wrong


def test_every_cell_is_in_the_record_and_does_what_was_trained() -> None:
    found = json.loads(OUT.read_text(encoding="utf-8"))["cells"]
    assert set(found) == {name for name, _ in cells()}
    assert wrong(found) == []


def test_a_cell_is_wrong_whose_file_does_something_else_or_nothing() -> None:
    found: dict[str, Cell] = {
        "right": {"effect": 0.5, "error": 1e-5},
        "another": {"effect": 0.5, "error": 0.01},
        "nothing": {"effect": 1e-5, "error": 0.0},
        "broken": {"effect": float("nan"), "error": float("nan")},
        "refused": {"refused": "leave one out"},
    }
    assert wrong(found) == ["another", "nothing", "broken"]
