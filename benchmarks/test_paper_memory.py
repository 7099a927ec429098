"""Table 7's benchmark on a tiny Llama: every method is measured, and only the algorithm in place moves W."""

from __future__ import annotations

from benchmarks.paper_memory import ARMS, SMALL, measured, table


def test_only_the_algorithm_in_place_moves_the_base() -> None:
    found = measured(SMALL, seconds=0, drift_steps=2)
    assert {arm for arm in ARMS if found["drift"][arm] > 0} == {"in place"}
    assert {arm for arm in ARMS if found["kept_bytes"][arm] > 0} == {"full", "low-rank"}
    assert all(found["peak_bytes"][arm] > 0 for arm in ARMS)
    assert len(table(found).splitlines()) == 2 + len(ARMS)
