"""Errors and notes on the page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from ..errors import describe_error, is_user_error
from ..forms.labels import with_labels


@contextmanager
def show_errors() -> Iterator[None]:
    """Show any error of the block as one sentence.

    Gradio renders it as HTML, and it may contain user input.
    """
    try:
        yield
    except gr.Error:  # a sentence already
        raise
    except Exception as error:
        cause = _cause(error)
        title = "Please check" if is_user_error(cause) else "Not done"
        text = escape(with_labels(describe_error(cause)), quote=False)
        raise gr.Error(text, title=title, print_exception=False) from error


class Page(gr.Blocks):
    """Blocks that show the errors of all events as sentences, including those outside of handlers."""

    async def process_api(self, *args: Any, **values: Any) -> dict[str, Any]:
        """Gradio's way through every event."""
        with show_errors():
            return await super().process_api(*args, **values)


def _cause(error: Exception) -> Exception:
    """Gradio puts an error of its own around that of a component."""
    is_around = type(error).__module__.startswith("gradio.") and isinstance(error.__cause__, Exception)
    return error.__cause__ if is_around else error  # type: ignore[return-value]


def percent(share: float, is_signed: bool = False) -> str:
    """`12%`, or `+12%` if signed; `under 1%` for a small share."""
    if share and not round(100 * share):
        return "under 1%"
    return f"{share:{'+' if is_signed else ''}.0%}"


def answer_card(message: str, rest: str) -> str:
    """The answer in large letters with its evidence below; empty without an answer."""
    if not message:
        return ""
    return f'<div class="fl-answer"><p><b>{escape(message)}</b></p><p>{escape(rest)}</p></div>'


def note(text: str, tone: str = "") -> str:
    """A card with the HTML `text`, read out by screen readers as it changes."""
    return f'<div class="fl-card {tone}" role="status">{text}</div>'
