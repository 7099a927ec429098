"""Removing all images or captions, after a question, and how images come back."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..context import AppContext
from ..reporting import told_on_the_page
from .captioning import empty_captions

IMAGES, CAPTIONS = "images", "captions"
YES = {IMAGES: "Yes, remove all images", CAPTIONS: "Yes, empty all captions"}
BRING_BACK = "Bring back the images from before"


def ask(what: str) -> tuple[Any, Any, str]:
    """The question before `what`, its button, and what it is about."""
    return gr.Row(visible=True), gr.Button(YES[what]), what


def confirmed(context: AppContext, session: str, what: str) -> Any:
    """Do what was asked about; what was refused of a drop is told no longer when all images are gone."""
    if not session:
        return gr.skip()
    if what == IMAGES:
        context.uploads.clear(session)
        return ""
    empty_captions(context, session)
    return gr.skip()


def bring_back(context: AppContext, session: str) -> str:
    """Exchange the images for those that were removed or replaced last; nothing is told as refused then."""
    with told_on_the_page():
        context.uploads.bring_back(session)
    return ""
