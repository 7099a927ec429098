"""One card for each image: its training view, caption field, notes, and a button to remove it.

A caption is saved while it is typed, and only over the version that was shown, since another window of the same
browser may have changed it. The browser's part is `static/image_cards.js`.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from typing import Any

from flatlora_diffusion.data.images import load_image

from ..context import AppContext
from ..errors import describe_error, is_user_error
from ..uploads.save_upload import MAX_CAPTION_LENGTH
from ..widgets.html import data_url, read_static
from .view import Card

_CardFunction = Callable[[dict[str, Any]], dict[str, Any]]
_LARGE = 1600  # pixels of the longer side
_ONE_AT_A_TIME = threading.Lock()  # a decoded image may take hundreds of megabytes

CARDS_CSS = read_static("image_cards.css")
CARDS_SCRIPT = read_static("image_cards.js")


def cards_page(cards: Sequence[Card], session: str) -> str:
    """All cards as one list.

    Each page is unique: for an equal page the browser would redraw nothing and keep typed text in its fields.
    """
    items = "".join(map(_card, cards))
    return f'<ul class="fl-photos" data-session="{escape(session)}" data-drawn="{time.time_ns()}">{items}</ul>'


def card_functions(context: AppContext) -> list[Callable[[dict[str, Any]], dict[str, Any]]]:
    """The functions that the cards call: `save_card`, `remove_card` and `enlarge_card`, from object to object.

    An error is returned as `message`; `can_retry` is true if the same call may succeed later.
    """

    @_with_error_message("Not saved")
    def save_card(asked: dict[str, Any]) -> dict[str, Any]:
        """The caption's new version and text; of another window's, when that was quicker."""
        session, image, version, text = (str(asked.get(name, "")) for name in ("session", "image", "version", "text"))
        kept = context.uploads.save_caption(session, image, version, text, asked.get("goes_on") is True)
        return {"version": kept.version, "text": kept.text, "is_saved": kept.is_saved}

    @_with_error_message("Not removed")
    def remove_card(asked: dict[str, Any]) -> dict[str, Any]:
        """Remove the image; the message is empty on success."""
        context.uploads.remove(str(asked.get("session", "")), str(asked.get("image", "")))
        return {"message": ""}

    @_with_error_message("as small as on its card")
    def enlarge_card(asked: dict[str, Any]) -> dict[str, Any]:
        """The uploaded image, shrunk to screen size, and its original size."""
        path = context.uploads.image(str(asked.get("session", "")), str(asked.get("image", "")))
        with _ONE_AT_A_TIME:
            picture = load_image(path)
        message = f"{picture.width} x {picture.height} pixels"
        picture.thumbnail((_LARGE, _LARGE))
        return {"picture": data_url(picture), "message": message}

    return [save_card, remove_card, enlarge_card]


def _with_error_message(what: str) -> Callable[[_CardFunction], _CardFunction]:
    """Return every error as a sentence after `what`, since Gradio does not pass errors on to the browser."""

    def decorate(function: _CardFunction) -> _CardFunction:
        @wraps(function)
        def answer(asked: dict[str, Any]) -> dict[str, Any]:
            try:
                return function(asked)
            except Exception as error:
                return {"message": f"{what}: {describe_error(error)}", "can_retry": not is_user_error(error)}

        return answer

    return decorate


def _card(card: Card) -> str:
    name, notes = escape(card.name), escape(" · ".join(card.notes))
    return (
        f'<li class="fl-photo" data-image="{card.image}" data-version="{card.version}" data-content="{card.content}">'
        f'<button type="button" data-enlarge aria-label="Enlarge {name}">'
        f'<img src="{data_url(card.picture)}" alt="" loading="lazy"></button>'
        f'<div class="fl-photo-head"><b>{_breakable(card.name)}</b>'
        f'<button type="button" data-remove aria-label="Remove {name}">Remove'
        f'</button></div><textarea aria-label="Caption of {name}" maxlength="{MAX_CAPTION_LENGTH}" '
        f'placeholder="What is to be seen, with the trigger word">{escape(card.caption)}</textarea>'
        f'<p>{notes}</p><span role="status"></span></li>'
    )


def _breakable(name: str) -> str:
    """A file's name as HTML that is broken after `-`, `_` and the like and before its suffix, if it has to be."""
    return "<wbr>".join(map(escape, re.split(r"(?<=[-_+,])|(?=\.\w+$)", name)))
