"""Errors as one sentence for the user: the problem and the remedy."""

from __future__ import annotations

import errno
import logging
import sqlite3
from pathlib import Path

from flatlora_diffusion.config import ConfigError, RunError

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def describe_error(error: Exception) -> str:
    """The sentence; unexpected errors are logged too, bugs with their traceback."""
    if is_user_error(error):
        return str(error)
    sentence = _of_the_computer(error)
    if sentence is not None:
        logger.warning("%s (%s)", sentence, error)
        return sentence
    logger.error("an error in this program", exc_info=error)
    kind = type(error).__name__
    return f"an error in this program prevented it ({kind}, see the app's log); reload the page, then try again"


def _of_the_computer(error: Exception) -> str | None:
    """The sentence for a disk, database or memory error; None for other errors."""
    if is_disk_full(error):
        return "the disk is full; free some room on it, then try again"
    if isinstance(error, sqlite3.OperationalError):
        return f"the app's database cannot be used ({error}); see whether its disk is full, then try again"
    if isinstance(error, OSError) and error.strerror:
        file = Path(str(error.filename)).name if error.filename else "a file"
        return f"{file} cannot be read or written: {error.strerror}; put that right, then try again"
    if isinstance(error, MemoryError):
        return "the computer's memory has run out; close other programs, then try again"
    return None


def is_disk_full(error: Exception) -> bool:
    """Whether a file or the database could not be written because the disk is full."""
    if isinstance(error, sqlite3.Error):
        return "disk is full" in str(error)
    return isinstance(error, OSError) and error.errno in _FULL


def is_user_error(error: Exception) -> bool:
    """Whether the error is caused by the request itself, so that a retry cannot succeed."""
    return isinstance(error, ConfigError | RunError)
