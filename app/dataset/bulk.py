"""Edits to all captions at once."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..uploads.captions import has_trigger
from ..widgets.messages import note, show_errors

REPLACE, FRONT, END, REMOVE = "Search and replace", "Put in front", "Put at the end", "Remove a word"
CHANGES = (REPLACE, FRONT, END, REMOVE)


def change_all(context: AppContext, session: str, how: str, text: str, by: str) -> str:
    """Change all captions of a session as `changed_captions` does; says how many were."""
    with show_errors():
        present = context.uploads.captions(session) if session else {}
        if not present:
            raise ConfigError("there are no images whose captions could be changed; drop some first")
        changed = changed_captions(present, how, text, by)
        context.uploads.save_captions(session, changed)
    return note(f"{len(changed)} of {len(present)} captions changed; Undo reverts this")


def changed_captions(captions: Mapping[str, str], how: str, text: str, by: str) -> dict[str, str]:
    """The captions that an edit changes, by image. A text is only added where the caption lacks it.

    Args:
        by: the replacement of `text` for REPLACE.

    Raises ConfigError without a text.
    """
    if not text.strip():
        raise ConfigError("the text is empty; write a text to search for or to insert")
    made = {
        name: _changed(caption, how, text if how == REPLACE else text.strip(), by)
        for name, caption in captions.items()
    }
    return {name: caption for name, caption in made.items() if caption != captions[name]}


def _changed(caption: str, how: str, text: str, by: str) -> str:
    if how == REPLACE:
        return caption.replace(text, by)
    if how == REMOVE:
        without = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", "", caption, flags=re.IGNORECASE)
        return _tidy(without) if without != caption else caption
    if has_trigger(caption, text):
        return caption
    parts = (text, caption) if how == FRONT else (caption, text)
    return " ".join(part for part in parts if part)


def _tidy(caption: str) -> str:
    """Remove double spaces and stray commas that a removed word leaves."""
    caption = re.sub(r"\s+", " ", caption)
    caption = re.sub(r"\s*,(\s*,)+", ",", caption)
    return re.sub(r"\s+,", ",", caption).strip(" ,")
