"""No test is decided by how fast the machine is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import patience
import pytest
from patience import HANGS, wait_until

ROOT = Path(__file__).parents[1]
FILES = sorted({*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/test_*.py")} - {Path(patience.__file__)})
CLOCKS = {"monotonic", "perf_counter", "process_time"}
WAITING = {"wait", "communicate", "join", "set_default_timeout"}  # a limit may be their first argument


def own_limits(tree: ast.AST) -> Iterator[int]:
    """The lines that read a clock, or that give up after a number of their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in CLOCKS:
            yield node.lineno
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            limits = [word.value for word in node.keywords if word.arg == "timeout"]
            limits += node.args[:1] if name in WAITING else []
            if any(isinstance(limit, ast.Constant) and isinstance(limit.value, int | float) for limit in limits):
                yield node.lineno


@pytest.mark.parametrize("line", ["time.monotonic() < end", "page.wait(60)", "run(command, timeout=60.0)"])
def test_a_limit_of_a_test_s_own_is_seen(line: str) -> None:
    assert list(own_limits(ast.parse(line))) == [1]


def test_no_test_gives_up_sooner_than_all_others() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for line in own_limits(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == [], "take wait_until or HANGS of tests/patience.py, on a page PATIENCE"


class SlowClock:
    """A minute passes between two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def look(self) -> float:
        self.now += 60
        return self.now


def test_what_is_slow_is_waited_for_while_what_has_ended_or_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SlowClock()
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=clock.look, sleep=lambda seconds: None))
    looks = iter([0] * 20 + [7])
    assert wait_until(lambda: next(looks)) == 7
    assert clock.now > 1200
    with pytest.raises(AssertionError, match="it has ended: no memory"):
        wait_until(lambda: None, is_alive=lambda: False, told=lambda: "no memory")
    assert wait_until(lambda: "its last word", is_alive=lambda: False) == "its last word"
    with pytest.raises(AssertionError, match="it hangs"):
        wait_until(lambda: None)
    assert clock.now > HANGS
