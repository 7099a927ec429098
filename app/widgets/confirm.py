"""Confirmation of actions that cannot be undone, or that may fail for lack of room.

The keyboard focus moves to the answer that changes nothing, and from there back to the button.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr

from .html import read_static

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Confirmation:
    """A hidden row with two answers. The caller connects `yes`, and then `hidden`."""

    row: gr.Row
    yes: gr.Button
    no: gr.Button

    @property
    def hidden(self) -> dict[str, Any]:
        """The event that takes the question off the page."""
        return {"fn": lambda: gr.Row(visible=False), "inputs": None, "outputs": [self.row], **_QUIET}


def build_confirmation(name: str, yes: str, no: str, variant: Literal["stop", "primary"] = "stop") -> Confirmation:
    """Build the row. `name`: prefix of the element ids; `variant`: red for what ends or removes something."""
    with gr.Row(visible=False, elem_id=f"{name}-question") as row:
        really = gr.Button(yes, variant=variant, size="sm", elem_id=f"{name}-yes", min_width=140)
        not_now = gr.Button(no, size="sm", elem_id=f"{name}-no", min_width=140)
    return Confirmation(row, really, not_now)


def confirm_before(button: gr.Button, question: Confirmation, about: gr.Dropdown | None = None) -> None:
    """Show the row on a click on the button. `about`: a choice whose change hides it again."""
    confirm_after(button.click(lambda: gr.Row(visible=True), None, [question.row], **_QUIET), button, question)
    if about is not None:
        about.change(**question.hidden)


def confirm_after(event: Any, button: gr.Button, question: Confirmation) -> None:
    """`event`: of the button, whose handler shows the question's row where there is something to ask."""
    event.then(**_focused(question.no))
    question.no.click(**question.hidden).then(**_focused(button))


def _focused(button: gr.Button) -> dict[str, Any]:
    return {"fn": None, "js": read_static("focus.js", ID=json.dumps(button.elem_id)), **_QUIET}
