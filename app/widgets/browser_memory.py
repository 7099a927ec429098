"""What a browser keeps of a page, so that a reload shows it as it was: what was filled in, and the tab in front.

It stays in the browser: the server never sees it but in the fields themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from .static_files import read_static

PREFIX = "flatlora-"


def remember_fields(
    load: Callable[..., Any],
    key: str,
    fields: Mapping[str, gr.components.Component],
    event: str = "change",
) -> Any:
    """Keep the values of `fields` as they change, and bring them back by `load`, the page's load event.

    event: `input` keeps nothing until somebody changes a field by hand. Returns the event after which they are back.
    To be called before other events of the fields, as a page waits for the answer of one before it begins the next.
    """
    parts = list(fields.values())
    gr.on([getattr(part, event) for part in parts], None, parts, None, js=_script("keep_fields.js", key, list(fields)))
    return load(None, None, parts, js=_script("restore_fields.js", key, list(fields)))


def remember_tab(
    load: Callable[..., Any], tabs: gr.Tabs, named: Mapping[str, gr.Tab], timers: Mapping[str, gr.Timer]
) -> None:
    """Open the page on the tab that was in front, and let only the timer of the tab in front tick.

    named: the tabs by their ids, each with `fl-tab-` and its id as `elem_id`; timers: in the order of the tabs.
    """
    script = _script("keep_tab.js", "tab", list(named), TICKING=list(timers))
    for tab in named.values():
        tab.select(None, None, list(timers.values()), js=script)
    load(None, None, [tabs], js=_script("restore_tab.js", "tab", list(named)))


def _script(file: str, key: str, names: list[str], **more: list[str]) -> str:
    values = {"KEY": PREFIX + key, "NAMES": names, **more}
    return read_static(file, **{name: json.dumps(value) for name, value in values.items()})
