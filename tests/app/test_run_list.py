"""The list of the Runs tab: what it says of each run, searched, sorted and grouped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.context import AppContext
from app.runs_tab.run_list import BY_NAME, BY_SCORE, BY_SIZE, GROUPED, NEWEST, filter_and_sort, list_page, rows_of
from app.runs_tab.tab import refresh
from flatlora_diffusion.config import TrainConfig


def make_run(context: AppContext, run_id: str, method: str, losses: list[float], **about: Any) -> None:
    folder: Path = context.runs.folder / run_id
    (folder / "images").mkdir(parents=True)
    config = TrainConfig.from_dict({"method": method, "max_train_steps": 4, "instance_data_dir": "x"}).to_dict()
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_model_name_or_path": "bases/toon-xl"}))
    (folder / "manifest.json").write_text("[]")
    events = [{"event": "step", "step": step, "loss": loss, "seconds": 1.0} for step, loss in enumerate(losses)]
    if "unseen" in about:
        events.append({"event": "validation", "step": 4, "loss": about["unseen"]})
    if about.get("has_picture"):
        Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
        events.append({"event": "preview", "step": 4, "images": ["a.png"]})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "big.bin").write_bytes(b"x" * about.get("size", 0))


@pytest.fixture
def runs(context: AppContext) -> AppContext:
    make_run(context, "demo/lora/seed-0", "lora", [0.3, 0.2], unseen=0.15, size=50)
    make_run(context, "demo/flat-lora/seed-0", "flat-lora", [0.3, 0.1], has_picture=True, size=5000)
    make_run(context, "cats-lora", "lora", [])
    context.runs.rename("cats-lora", "<b>Aunt's cats")
    context.runs.tag("cats-lora", "fur")
    return context


def names(page: str) -> list[str]:
    return re.findall('data-run="(.*?)"', page)


@pytest.mark.parametrize(
    ("words", "order", "found"),
    [
        ("fur", NEWEST, ["cats-lora"]),
        ("TOON flat", NEWEST, ["demo/flat-lora/seed-0"]),
        ("nothing of the kind", NEWEST, []),
        ("", BY_NAME, ["cats-lora", "demo/flat-lora/seed-0", "demo/lora/seed-0"]),
        ("", BY_SCORE, ["demo/flat-lora/seed-0", "demo/lora/seed-0", "cats-lora"]),
        ("demo", BY_SIZE, ["demo/flat-lora/seed-0", "demo/lora/seed-0"]),
        ("", GROUPED, ["cats-lora", "demo/flat-lora/seed-0", "demo/lora/seed-0"]),
    ],
)
def test_runs_are_searched_and_sorted(runs: AppContext, words: str, order: str, found: list[str]) -> None:
    assert [row.id for row in filter_and_sort(rows_of(runs), words, order)] == found
    assert names(refresh(runs, None, words, order)[0]) == found


def test_a_row_tells_what_there_is_to_know(runs: AppContext) -> None:
    page, choice, storage, trash, *_ = refresh(runs, "demo/lora/seed-0", "", NEWEST)
    for told in ("toon-xl", "2 of 4 steps", "loss 0.1500 on unseen images", "loss 0.1000 in training", "a.png"):
        assert told in page, told
    assert 'data-run="demo/lora/seed-0" aria-pressed="true"' in page
    assert page.count('aria-pressed="true"') == 1
    assert "&lt;b&gt;Aunt&#x27;s cats" in page
    assert "<b>Aunt" not in page
    assert choice.value == "demo/lora/seed-0"
    assert "3 runs take " in storage
    assert not trash.visible


def test_runs_that_were_trained_together_stand_together(runs: AppContext) -> None:
    make_run(runs, "demo/sigma-0/seed-0", "flat-lora", [0.2])  # a null of the experiment, called as no method is
    page = refresh(runs, None, "", GROUPED)[0]
    assert re.findall("<h3>(.*?)</h3>", page) == ["cats", "demo"]
    assert names(page)[1:] == ["demo/flat-lora/seed-0", "demo/lora/seed-0", "demo/sigma-0/seed-0"]


def test_an_empty_list_says_what_to_do(context: AppContext) -> None:
    assert "No runs yet" in refresh(context, None, "", NEWEST)[0]
    assert "No run has these words" in list_page([], NEWEST, None, is_searched=True)
