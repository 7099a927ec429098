"""The trash on the page: restore deleted runs, or delete them permanently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import gradio as gr

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..widgets.confirm import Confirmation, build_confirmation, confirm_before
from ..widgets.messages import show_errors


@dataclass(frozen=True)
class TrashParts:
    """The components. `fold`: the accordion, hidden while the trash is empty."""

    fold: gr.Accordion
    entries: gr.Dropdown
    restore_button: gr.Button
    delete_button: gr.Button
    question: Confirmation


def build_trash() -> TrashParts:
    with gr.Accordion("Trash", open=True, visible=False, elem_id="trash") as fold:
        entries = gr.Dropdown([], label="Deleted runs, the last first")
        with gr.Row():
            restore_button = gr.Button("Restore", min_width=120)
            delete_button = gr.Button("Delete for good", variant="stop", min_width=120, elem_id="delete-for-good")
        question = build_confirmation("delete-for-good", "Yes, delete it for good", "No, keep it")
    return TrashParts(fold, entries, restore_button, delete_button, question)


def look(context: AppContext) -> tuple[Any, Any]:
    """(accordion, choice of deleted runs, most recently deleted first)."""
    entries = context.runs.trash.entries()
    choices = [
        (f"{entry.run}, deleted {datetime.fromtimestamp(entry.deleted).strftime('%d %b, %H:%M')}", entry.id)
        for entry in entries
    ]
    first = entries[0].id if entries else None
    shown = gr.Accordion(f"Trash ({len(entries)})", visible=bool(entries))
    return shown, gr.Dropdown(choices=choices, value=first)


def delete_for_good(context: AppContext, key: str | None) -> None:
    """Remove a deleted run from the disk."""
    with show_errors():
        if not key:
            raise ConfigError("no run is chosen; choose one in the trash")
        context.runs.trash.delete_for_good(key)


def connect_trash(context: AppContext, trash: TrashParts, again: Callable[[Any], Any]) -> None:
    """Connect the events. `again`: adds the redrawing of list and trash to an event."""
    shown: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    confirm_before(trash.delete_button, trash.question, trash.entries)
    gone = trash.question.yes.click(partial(delete_for_good, context), [trash.entries], None, **shown)
    again(gone).then(**trash.question.hidden)
