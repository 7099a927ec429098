"""What a browser keeps of a page, so that a reload shows it as it was: what was filled in, and the tab in front.

It stays in the browser: the server never sees it but in the fields themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

PREFIX = "flatlora-"
# Before the kept values are back, the page's own must not be kept in their place.
_RESTORE = """() => {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem(KEY)) || {}; } catch (error) {}
  (window.flatloraRestored ??= new Set()).add(KEY);
  return NAMES.map((name) => kept[name] ?? {__type__: 'update'});
}"""
_KEEP = """(...now) => {
  if (!window.flatloraRestored?.has(KEY)) return;
  localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(NAMES.map((name, place) => [name, now[place]]))));
}"""
# The page is asked which tab is in front: Gradio also says "selected" of a restored tab that the visitor has left
# since, and of the first one at the start. What is chosen before the kept tab is back is the visitor's.
_KEEP_TAB = """async () => {
  await new Promise((done) => setTimeout(done, 50));
  const front = NAMES.find((name) => document.getElementById('fl-tab-' + name)?.getClientRects().length);
  if (window.flatloraRestored?.has(KEY)) localStorage.setItem(KEY, front);
  else if (front !== NAMES[0]) window.flatloraChosen = front;
  return NAMES.flatMap((name) => TICKING.includes(name) ? [{__type__: 'update', active: name === front}] : []);
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
    return load(None, None, parts, js=_filled(_RESTORE, key, list(fields)))


def keep_tab(
    load: Callable[..., Any], tabs: gr.Tabs, named: Mapping[str, gr.Tab], timers: Mapping[str, gr.Timer]
) -> None:
    """Open the page on the tab that was in front, and let only the timer of the tab in front tick.

    named: the tabs by their ids, each with `fl-tab-` and its id as `elem_id`; timers: in the order of the tabs.
    """
    script = _filled(_KEEP_TAB, "tab", list(named)).replace("TICKING", json.dumps(list(timers)))
    for tab in named.values():
        tab.select(None, None, list(timers.values()), js=script)
    load(None, None, [tabs], js=_filled(_RESTORE_TAB, "tab", list(named)))


def _filled(script: str, key: str, names: list[str]) -> str:
    return script.replace("KEY", json.dumps(PREFIX + key)).replace("NAMES", json.dumps(names))
