"""What goes wrong, told on the page where it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import gradio as gr

from flatlora_diffusion.config import ConfigError

from .train.words import in_form_words


@contextmanager
def told_on_the_page() -> Iterator[None]:
    """Show a ConfigError of the block as its sentence; other errors are bugs and keep their traceback.

    Gradio renders it as HTML, and it may quote what somebody has typed.
    """
    try:
        yield
    except ConfigError as error:
        raise gr.Error(
            escape(in_form_words(str(error)), quote=False), title="Please check", print_exception=False
        ) from error


def percent(share: float, is_signed: bool = False) -> str:
    """`12%`, or `+12%` if it is signed; of what rounds to nothing that it is `under 1%`."""
    if share and not round(100 * share):
        return "under 1%"
    return f"{share:{'+' if is_signed else ''}.0%}"


def answer_card(told: str, rest: str) -> str:
    """The answer in large letters, and what it rests on below; nothing without one."""
    if not told:
        return ""
    return f'<div class="fl-answer"><p><b>{escape(told)}</b></p><p>{escape(rest)}</p></div>'


def note(text: str, tone: str = "") -> str:
    """A card with the HTML `text`, read out by screen readers as it changes."""
    return f'<div class="fl-card {tone}" role="status">{text}</div>'
