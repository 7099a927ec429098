"""The whole runs are compared turn by turn, with the same settings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.whole_run import SETTINGS, SUBJECTS, Took, commands_of, figures, rotated, run
from flatlora_diffusion.storage.run_dir import LORA_FILE


def test_each_arm_goes_first_in_turn() -> None:
    assert [rotated(["diffusers", "ours"], turn)[0] for turn in range(4)] == ["diffusers", "ours"] * 2


def test_ratios_are_those_of_the_processor_s_seconds_within_a_turn() -> None:
    took = {
        "diffusers": [Took(10.0, 99.0, 5), Took(20.0, 1.0, 7), Took(40.0, 1.0, 6)],
        "ours": [Took(9.0, 1.0, 4), Took(10.0, 99.0, 3), Took(36.0, 1.0, 2)],
    }
    found = figures(took)
    assert found["ours / diffusers"] == 0.9
    assert found["peak_bytes"] == {"diffusers": 7, "ours": 4}


def test_both_programs_get_the_same_settings(tmp_path: Path) -> None:
    for subject in SUBJECTS:
        commands = commands_of(Path("script.py"), subject, 5, tmp_path / "base", tmp_path)
        script, ours = (set(commands[arm][2:]) for arm in ("diffusers", "ours"))
        assert script <= ours
        assert "--max_train_steps=5" in script
        assert {flag.partition("=")[0].lstrip("-") for flag in script} >= {*SETTINGS, *SUBJECTS[subject]}
    assert list((tmp_path / "images").glob("*.png"))
    assert not list((tmp_path / "images").glob("*.txt"))


def test_the_memory_of_a_run_is_not_that_of_the_benchmark(tmp_path: Path) -> None:
    """This process has imported PyTorch, the child has not."""
    resource = pytest.importorskip("resource")
    output = tmp_path / "run"
    program = f"import pathlib; (p := pathlib.Path({str(output)!r})).mkdir(); (p / {LORA_FILE!r}).touch()"
    took = run([sys.executable, "-c", program], output, threads=1)
    assert 0 < took.peak_bytes < 100e6 < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert took.cpu > 0
