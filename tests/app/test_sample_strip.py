"""The samples of a run over its steps: several prompts, the picture from before the training, a strip that grows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from app.context import AppContext
from app.forms.forms import ConfigForm, preset_settings
from app.runs_tab.tab import details
from app.train.live_view import live
from app.widgets.sample_strip import MAX_COLUMNS, sampled_steps
from flatlora_diffusion.config import TrainConfig

PROMPTS = ["a <fox>", "an owl"]


def begin(context: AppContext, run_id: str) -> None:
    """A run that the queue knows of and that has not drawn anything yet."""
    config = TrainConfig.from_dict({"instance_data_dir": "x", "max_train_steps": 9})
    context.queue.add_training(config, run_id, "")
    folder = context.runs.folder / run_id
    (folder / "images").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "manifest.json").write_text("[]")


def draw(context: AppContext, run_id: str, step: int, **about: Any) -> None:
    """What the trainer leaves of one set of previews."""
    folder: Path = context.runs.folder / run_id
    names = [f"step-{step}-{place}.png" for place in range(len(about.get("prompts", PROMPTS)))]
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / "images" / name)
    with open(folder / "events.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "preview", "step": step, "images": names} | about) + "\n")


def heads(page: str) -> list[str]:
    return re.findall(r'<th scope="col".*?>(.*?)</th>', page)


def rows(page: str) -> dict[str, list[str]]:
    """The file of each picture of a row, empty for one that is not there, by the row's title."""
    found = re.findall(r'<th scope="rowgroup".*?<span>(.*?)</span></th></tr><tr>(.*?)</tr>', page)
    return {
        title: [(re.findall(r'/([^/"]+\.png)"', cell) or [""])[0] for cell in cells.split("</td>")[:-1]]
        for title, cells in found
    }


def test_the_strip_grows_by_a_column_with_a_row_for_each_prompt(context: AppContext) -> None:
    begin(context, "one")
    *_, samples, _, _, _, seen = live(context, None, None)
    assert not samples.visible
    draw(context, "one", 0, prompts=PROMPTS, seeds=[0, 0])
    *_, samples, _, _, _, seen = live(context, None, seen)
    assert samples.visible
    assert heads(samples.value) == ["Before training"]
    draw(context, "one", 6, prompts=PROMPTS, seeds=[0, 0])
    *_, samples, _, _, _, seen = live(context, None, seen)
    assert heads(samples.value) == ["Before training", "Step 6"]
    assert rows(samples.value) == {
        "a &lt;fox&gt;": ["step-0-0.png", "step-6-0.png"],
        "an owl": ["step-0-1.png", "step-6-1.png"],
    }
    assert 'alt="an owl, step 6"' in samples.value
    assert 'aria-label="Samples of one"' in samples.value
    assert live(context, None, seen)[4] == gr.skip()  # nothing new is not sent again
    assert details(context, "one")[2].value == samples.value


def test_other_seeds_and_prompts_that_came_later_have_rows_of_their_own(context: AppContext) -> None:
    begin(context, "one")
    draw(context, "one", 0, prompts=["a fox", "a fox"], seeds=[0, 1])
    draw(context, "one", 6, prompts=["a fox", "a key"], seeds=[0, 0])
    (context.runs.folder / "one" / "images" / "step-6-1.png").unlink()  # somebody has cleared up
    assert rows(live(context, None, None)[4].value) == {
        "a fox · seed 0": ["step-0-0.png", "step-6-0.png"],
        "a fox · seed 1": ["step-0-1.png", ""],
        "a key": ["", ""],
    }


def test_samples_of_an_earlier_version_are_counted(context: AppContext) -> None:
    begin(context, "one")
    draw(context, "one", 0)
    assert list(rows(live(context, None, None)[4].value)) == ["Preview 1", "Preview 2"]


@pytest.mark.parametrize("count", [1, 2, MAX_COLUMNS, MAX_COLUMNS + 1, 1000])
def test_a_long_strip_is_thinned_out_between_its_ends(count: int) -> None:
    steps = [6 * number for number in range(count)]
    shown = sampled_steps(steps)
    assert (shown[0], shown[-1]) == (steps[0], steps[-1])
    assert len(shown) <= MAX_COLUMNS
    assert len(shown) == count or len(shown) > MAX_COLUMNS // 2


def test_the_form_has_several_prompts_and_draws_them_on_the_way() -> None:
    form = ConfigForm()
    assert form.by_name["validation_prompt"].lines > 1
    config = form.read(form.write(preset_settings("Paper", {})), "flat-lora")
    assert len(config.run.preview_prompts) == 3
    assert config.optim.max_train_steps is not None
    passes = config.optim.max_train_steps / 20  # of 20 images
    assert passes / config.run.validation_epochs >= 4
