"""`benchmarks/gpu.sh` runs on the day that a GPU is at hand: its parts run on a CPU, at tiny sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


@pytest.mark.long  # four processes
@pytest.mark.skipif(shutil.which("bash") is None, reason="a script for bash")
def test_each_part_leaves_its_figures(base: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "SMALL": "1", "BASE": str(base), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in tmp_path.glob("*.json")}
    assert found.keys() == {"step_small", "layer_cost", "memory", "memory_lora"}
    assert all(figures["versions"] and figures["device"] and figures["date"] for figures in found.values())
    assert found["memory"]["steps"] == 2
    (subject,) = (value for name, value in found["step_small"].items() if name.startswith("whole base"))
    assert len(subject["low-rank / lora"]) == 3, "quartiles"
    assert (
        found["layer_cost"]["shapes"]["small"]["drift"]["low-rank"]
        == 0
        == (found["layer_cost"]["shapes"]["small"]["drift"]["full"])
    )
    assert found["layer_cost"]["shapes"]["small"]["drift"]["in place"] > 0
