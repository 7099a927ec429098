"""The bar over what is left to measure."""

from __future__ import annotations

from functools import partial

import pytest
from torch import nn

from flatlora_diffusion.compare.progress import WorkItem, run_items


def test_a_bar_shows_the_current_work_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    unet = nn.Identity()
    done: list[str] = []

    def asked(what: str) -> None:
        unet([[0.0, 0.0]])
        done.append(what)

    passes = {"a": 2, "b": 0, "c": 9}
    pieces = [WorkItem(f"LoRA: {what}", count, partial(asked, what)) for what, count in passes.items()]
    run_items(unet, pieces)
    assert done == ["a", "c"]
    shown = capsys.readouterr().err
    assert "LoRA: a:   0%" in shown
    assert "LoRA: c: 100%" in shown
    assert "left" in shown
    run_items(unet, pieces[1:2])
    assert capsys.readouterr().err == "", "nothing to do has no bar"
