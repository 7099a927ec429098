"""Removing all images, and how they come back."""

from __future__ import annotations

from ..context import AppContext
from ..widgets.messages import show_errors

RESTORE_REMOVED = "Bring back the images from before"


def remove_all(context: AppContext, session: str) -> str:
    """Remove all images; also clears the rejections of the last upload."""
    if session:
        context.uploads.clear(session)
    return ""


def restore_removed(context: AppContext, session: str) -> str:
    """Swap the images with those removed or replaced last; also clears the rejections of the last upload."""
    with show_errors():
        context.uploads.restore_removed(session)
    return ""
