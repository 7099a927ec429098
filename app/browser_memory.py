"""What a browser keeps of a page, so that a reload shows it as it was: what was filled in, and the tab in front.

It stays in the browser: the server never sees it but in the fields themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

_PREFIX = "flatlora-"
# Before the kept values are back, the page's own must not be kept in their place.
_RESTORE = """() => {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem(KEY)) || {}; } catch (error) {}
  (window.flatloraRestored ??= new Set()).add(KEY);
  return NAMES.map((name) => name in kept ? kept[name] : {__type__: 'update'});
}"""
_KEEP = """(...now) => {
  if (!window.flatloraRestored?.has(KEY)) return;
  localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(NAMES.map((name, place) => [name, now[place]]))));
}"""
# Gradio says at the start that the first tab was selected; another one is the visitor's choice, who need not wait.
_KEEP_TAB = """() => {
  if (window.flatloraRestored?.has(KEY)) localStorage.setItem(KEY, NAMES[0]);
  else if (!IS_FIRST) window.flatloraChosen = NAMES[0];
}"""
_RESTORE_TAB = """() => {
  const chosen = window.flatloraChosen, kept = localStorage.getItem(KEY);
  (window.flatloraRestored ??= new Set()).add(KEY);
  if (chosen) localStorage.setItem(KEY, chosen);
  return !chosen && NAMES.includes(kept) ? {__type__: 'update', selected: kept} : {__type__: 'update'};
}"""


def keep_fields(
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
    gr.on([getattr(part, event) for part in parts], None, parts, None, js=_filled(_KEEP, key, list(fields)))
    return load(None, parts, parts, js=_filled(_RESTORE, key, list(fields)))


def keep_tab(load: Callable[..., Any], tabs: gr.Tabs, named: Mapping[str, gr.Tab]) -> None:
    """Open the page on the tab that was in front; `named`: the tabs by their ids. Before other events of the tabs."""
    for place, (name, tab) in enumerate(named.items()):
        script = _KEEP_TAB.replace("IS_FIRST", json.dumps(place == 0))
        tab.select(None, None, None, js=_filled(script, "tab", [name]))
    load(None, None, [tabs], js=_filled(_RESTORE_TAB, "tab", list(named)))


def _filled(script: str, key: str, names: list[str]) -> str:
    return script.replace("KEY", json.dumps(_PREFIX + key)).replace("NAMES", json.dumps(names))
