"""The soak itself, short: a run on the tiny base that is killed loses nothing, nor does a command aimed amiss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="without forks it takes minutes")
def test_kills_and_a_second_run_lose_nothing_touch_nothing_and_say_what_is_promised(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--kills=2", "--seed=5", f"--output={output}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert output.is_file(), done.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    assert {name: result[name] for name in ("kills", "lost", "touched", "wrong")} == {
        "kills": 2,
        "lost": 0,
        "touched": 0,
        "wrong": 0,
    }, done.stderr
    assert done.returncode == 0
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    assert "| all |  | 2 | 0 | 0 | 0 |" in done.stdout


@pytest.mark.long
def test_no_command_and_no_caption_loses_what_is_there() -> None:
    command = [sys.executable, "-m", "benchmarks.soak_attempts"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert " attempts, 0 wrong" in done.stdout, done.stdout
    assert done.returncode == 0
    assert done.stdout.count("refused: ") >= 37
