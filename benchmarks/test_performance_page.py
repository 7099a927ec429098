"""The figures of docs/performance.md are those of the benchmarks' files."""

from __future__ import annotations

import json
import re
import statistics

import pytest

from benchmarks.performance_page import FOLDER, PAGE, TABLES, block, command, filled, subjects


def test_the_page_is_what_its_command_writes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run `python -m benchmarks.performance_page`"
    for name in TABLES:
        assert block(name) in page


def test_a_table_has_the_medians_of_its_file() -> None:
    figures = json.loads((FOLDER / "train_step.json").read_text(encoding="utf-8"))
    for subject, found in figures.items():
        if isinstance(found, dict) and "turns" in found:
            assert subject in block("train_step")
            assert f"| {found['low-rank / lora'][1]:.3f} |" in block("train_step")


def test_the_ratio_of_a_whole_run_is_that_of_its_seconds() -> None:
    figures = json.loads((FOLDER / "whole_run.json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    for subject, found in subjects(figures).items():
        pairs = zip(*(found["seconds"][arm] for arm in ("ours", "diffusers")), strict=True)
        ratio = statistics.median(ours / script for ours, script in pairs)
        assert found["ours / diffusers"] == pytest.approx(ratio, rel=0.01)
        assert f"| {subject} | {found['steps']} | {found['turns']} |" in page
        assert f"| {found['ours / diffusers']:.2f} |" in page


@pytest.mark.parametrize("name", TABLES)
def test_a_footer_s_command_has_flags_that_its_benchmark_takes(name: str) -> None:
    figures = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    taken = re.findall(r'add_argument\(\s*"(--\w+)"', (FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    given = re.findall(r"--\w+", command(name, figures))
    assert set(given) <= set(taken)
    assert "--threads" in given or "--threads" not in taken
