"""Every event of the page can be called: its handler takes what the page gives it."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import gradio as gr
import pytest
from gradio.blocks import BlockFunction

from app.context import make_context
from app.runs_tab import tab as runs_tab
from app.settings import AppSettings
from app.ui import build_app

_GIVEN = (gr.Request, gr.EventData, gr.SelectData)  # by Gradio, when it sees the annotation
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> gr.Blocks:
    runs = tmp_path_factory.mktemp("wiring") / "runs"
    return build_app(make_context(AppSettings(runs_dir=str(runs))))


def misfit(handler: Callable[..., Any], inputs: int) -> str | None:
    """Why a handler cannot be called with so many inputs; None when it can."""
    inner = handler.func if isinstance(handler, functools.partial) else handler
    hints = typing.get_type_hints(inner)
    parameters = [one for one in inspect.signature(handler).parameters.values() if one.kind in _POSITIONAL]
    given = [place for place, one in enumerate(parameters) if hints.get(one.name) in _GIVEN]
    named = [one.name for one in inspect.signature(inner).parameters.values() if hints.get(one.name) in _GIVEN]
    if len(named) != len(given):
        return f"{named} must be positional"
    if given and isinstance(handler, functools.partial):
        return f"Gradio does not see {named} of a partial"
    is_request = any(hints.get(name) is gr.Request for name in named)
    if is_request and given != [0]:
        return f"{named} must come first"
    try:
        inspect.signature(handler).bind(*[None] * (inputs + len(given)))
    except TypeError as error:
        return str(error)
    return None


def test_every_handler_takes_the_inputs_of_its_event(page: gr.Blocks) -> None:
    called = [one for one in page.fns.values() if one.fn is not None and not one.js]
    assert len(called) > 25
    wrong = {one.name: why for one in called if (why := misfit(one.fn, len(one.inputs)))}
    assert wrong == {}


def test_copies_of_uploads_are_cleared_away(page: gr.Blocks) -> None:
    assert page.delete_cache is not None
    every, age = page.delete_cache
    assert every <= 3600
    assert age <= 24 * 3600


def test_no_component_is_given_twice_as_an_output(page: gr.Blocks) -> None:
    for one in page.fns.values():
        assert len({part._id for part in one.outputs}) == len(one.outputs), one.name


def test_only_the_timer_of_the_tab_in_front_ticks(page: gr.Blocks) -> None:
    timers = [part for part in page.blocks.values() if isinstance(part, gr.Timer)]
    assert [timer.active for timer in timers] == [False] * 3
    tabs = {part.id: part for part in page.blocks.values() if isinstance(part, gr.Tab) and isinstance(part.id, str)}
    assert {name: tab.elem_id for name, tab in tabs.items()} == {name: f"fl-tab-{name}" for name in tabs}
    for tab in tabs.values():
        (event,) = [one for one in page.fns.values() if one.outputs == timers and (tab._id, "select") in one.targets]
        assert event.fn is None, "an answer of the app could be overtaken by that of another tab"
        assert str(list(tabs)).replace("'", '"') in str(event.js)
        assert '["train", "compare", "flatness"].includes' in str(event.js)


def test_the_details_of_a_run_are_shown_anew_with_the_table(page: gr.Blocks) -> None:
    def is_of(one: BlockFunction, *handlers: Callable[..., Any]) -> bool:
        return isinstance(one.fn, functools.partial) and one.fn.func in handlers

    shown = [one.trigger_after for one in page.fns.values() if is_of(one, runs_tab.look_again)]
    listed = {number for number, one in page.fns.items() if is_of(one, runs_tab.refresh)}
    assert len(shown) == 3  # as the tab is opened, after Refresh, and of a run that was brought back
    assert set(shown) <= listed


def test_nothing_waits_for_a_change_of_a_dropdown_for_many(page: gr.Blocks) -> None:
    """It comes without end once the choices were filled in, and keeps the browser busy."""
    many = {part._id for part in page.blocks.values() if isinstance(part, gr.Dropdown) and part.multiselect}
    assert len(many) == 2
    heard = {target for one in page.fns.values() for target in one.targets}
    assert not heard & {(part, "change") for part in many}
