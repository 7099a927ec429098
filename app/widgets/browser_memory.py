"""Form fields and the selected tab, stored in the browser so that they outlast a reload.

The server never sees what is stored, except in the fields themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from .html import read_static

PREFIX = "flatlora-"


def remember_fields(
    load: Callable[..., Any],
    key: str,
    fields: Mapping[str, gr.components.Component],
    event: str = "change",
) -> Any:
    """Store the values of `fields` in the browser, and restore them on `load`, the page's load event.

    Connect it before other events of the fields, as a page waits for one answer before it starts the next event.

    Args:
        event: with `input`, only edits by the user are stored.

    Returns:
        The event after which the values are restored.
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
