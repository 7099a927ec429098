"""Removing all images, and how they come back."""

from __future__ import annotations

from ..context import AppContext
from ..widgets.messages import show_errors

RESTORE_REMOVED = "Bring back the images from before"


def remove_all(context: AppContext, session: str) -> str:
    """Remove all images; what was refused of a drop is told no longer then."""
    if session:
        context.uploads.clear(session)
    return ""


def restore_removed(context: AppContext, session: str) -> str:
    """Exchange the images for those that were removed or replaced last; nothing is told as refused then."""
    with show_errors():
        context.uploads.restore_removed(session)
    return ""
