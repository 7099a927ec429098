"""What ends or removes something looks it, and asks before it does."""

from __future__ import annotations

import re
from typing import Any

import gradio as gr
import pytest

from app.context import make_context
from app.settings import AppSettings
from app.ui import build_app
from app.widgets.run_cards import CANCEL, EARLIER, RESUME, SAVE, STOP, action_buttons

ASKING = {
    "delete-run": "Delete",
    "delete-for-good": "Delete for good",
    "cancel-all": "Cancel all waiting jobs",
    "stop-measuring": "Stop measuring",
    "end-vote": "End without a verdict",
    "remove-all": "Remove all images",
    "empty-captions": "Empty all captions",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> gr.Blocks:
    return build_app(make_context(AppSettings(runs_dir=str(tmp_path_factory.mktemp("questions") / "runs"))))


def buttons(page: gr.Blocks) -> dict[str, gr.Button]:
    return {str(part.elem_id): part for part in page.blocks.values() if isinstance(part, gr.Button)}


def chain_after(page: gr.Blocks, event: Any) -> list[Any]:
    """The events that follow one another after this one."""
    after = [one for one in page.fns.values() if one.trigger_after == event._id]
    return [*after, *(later for one in after for later in chain_after(page, one))]


def test_each_red_button_asks_or_is_the_answer(page: gr.Blocks) -> None:
    red = {name: one.value for name, one in buttons(page).items() if one.variant == "stop"}
    assert {name: text for name, text in red.items() if not name.endswith("-yes")} == ASKING
    assert {name for name in red if name.endswith("-yes")} == {f"{name}-yes" for name in ASKING}
    ending = re.compile(r"delete|remove|cancel|empty|clear|discard|\bend\b", re.IGNORECASE)
    plain = [one.value for one in buttons(page).values() if one.variant != "stop" and ending.search(str(one.value))]
    assert plain == []


@pytest.mark.parametrize("name", ASKING)
def test_the_first_click_only_asks_and_the_focus_goes_to_no(page: gr.Blocks, name: str) -> None:
    asking, yes, no = (buttons(page)[name + end] for end in ("", "-yes", "-no"))
    row = yes.parent
    assert isinstance(row, gr.Row)
    assert not row.visible
    hidden_with = asking.parent
    assert hidden_with.visible or row in hidden_with.children, "the question goes with its button"
    (done,) = [one for one in page.fns.values() if (yes._id, "click") in one.targets]
    assert done.fn is not None, "yes does what was asked"
    assert any(one.outputs == [row] for one in chain_after(page, done)), "and takes the question away"
    (asked,) = [one for one in page.fns.values() if (asking._id, "click") in one.targets]
    assert asked.outputs == [row]
    assert asked.fn().visible
    (denied,) = [one for one in page.fns.values() if (no._id, "click") in one.targets]
    assert denied.outputs == [row]
    assert not denied.fn().visible
    for event, focused in ((asked, no), (denied, asking)):
        after = [one for one in page.fns.values() if one.trigger_after == event._id]
        assert [f'"{focused.elem_id}"' in str(one.js) for one in after] == [True]


@pytest.mark.parametrize(("name", "about"), [("delete-run", "Run"), ("delete-for-good", "Deleted runs")])
def test_a_question_is_gone_when_it_would_be_about_another_run(page: gr.Blocks, name: str, about: str) -> None:
    row = buttons(page)[f"{name}-yes"].parent
    (choice,) = [
        part
        for part in page.blocks.values()
        if isinstance(part, gr.Dropdown) and str(part.label).split(",")[0] == about and not part.multiselect
    ]
    hiding = [one for one in page.fns.values() if one.outputs == [row] and (choice._id, "change") in one.targets]
    assert [one.fn().visible for one in hiding] == [False]


def test_the_buttons_of_a_card_that_end_something_have_to_be_pressed_twice() -> None:
    made = action_buttons([STOP, SAVE, RESUME, CANCEL, EARLIER], "my <run>")
    asking = re.findall(r'<button type="button" class="fl-ends" data-name="(\w+)" data-sure="(.*?)" data-act', made)
    assert asking == [("Stop", "Stop it?"), ("Cancel", "Cancel it?")]
    assert made.count("<button") == 5
    assert made.count('data-of="my &lt;run&gt;"') == 5
