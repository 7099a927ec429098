"""Removing images: one, all of them after a question, and how they come back."""

from __future__ import annotations

from typing import Any

import gradio as gr

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..dataset.captioning import empty_captions
from ..reporting import told_on_the_page

IMAGES, CAPTIONS = "images", "captions"
YES = {IMAGES: "Yes, remove all images", CAPTIONS: "Yes, empty all captions"}
BRING_BACK = "Bring back the images from before"
NONE_CHOSEN = "Remove one image: choose it above"


def choose(context: AppContext, session: str, image: str) -> tuple[str, Any]:
    """The image to remove, and the button that does it and names it."""
    name = context.uploads.names(session).get(image) if session and image else None
    return (image, gr.Button(f"Remove {name}", interactive=True)) if name else ("", _no_choice())


def remove_one(context: AppContext, session: str, image: str) -> tuple[str, Any]:
    """Remove the chosen image; nothing is chosen then."""
    with told_on_the_page():
        if not image:
            raise ConfigError("no image is chosen; click one in the gallery or in the table")
        context.uploads.remove(session, image)
    return "", _no_choice()


def ask(what: str) -> tuple[Any, Any, str]:
    """The question before `what`, its button, and what it is about."""
    return gr.Row(visible=True), gr.Button(YES[what]), what


def confirmed(context: AppContext, session: str, what: str) -> tuple[Any, ...]:
    """Do what was asked about: (the chosen image, its button, what was refused)."""
    if what == IMAGES:
        return clear(context, session)
    empty_captions(context, session)
    return gr.skip(), gr.skip(), gr.skip()


def clear(context: AppContext, session: str) -> tuple[str, Any, str]:
    """Remove all of the session's images; nothing is chosen then, nothing refused."""
    if session:
        context.uploads.clear(session)
    return "", _no_choice(), ""


def bring_back(context: AppContext, session: str) -> tuple[str, Any, str]:
    """Exchange the images for those that were removed or replaced last; nothing is chosen then, nothing refused."""
    with told_on_the_page():
        context.uploads.bring_back(session)
    return "", _no_choice(), ""


def _no_choice() -> Any:
    return gr.Button(NONE_CHOSEN, interactive=False)
