"""Folders that must lie apart: what the program writes into, and the images that it reads.

A picture that is written among images becomes one of them, and images inside of a run's folder go with the run when
that is deleted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from flatlora_diffusion.config import ConfigError

Relation = Literal["is", "lies in", "holds"]


def check_apart(
    setting: str,
    written: Path,
    other: str,
    images: Iterable[Path],
    refused: tuple[Relation, ...] = ("is", "lies in", "holds"),
) -> None:
    """Raises ConfigError if `written`, the value of `setting`, lies to a folder of images as is `refused`.

    `images` are the folders that the setting `other` names.
    """
    for folder in images:
        found = relation(written, folder)
        if found in refused:
            whole = _whole(folder)
            offered = whole.parent / f"{whole.name}-{setting.removesuffix('_dir')}"
            raise ConfigError(
                f"{setting}={str(written)!r} {found} {other}={str(folder)!r}: images and what is written must lie "
                f"apart; give another folder, such as {str(offered)!r}"
            )


def relation(one: Path, other: Path) -> Relation | None:
    """How `one` lies to `other`, whether they exist or not; None for apart.

    Links are followed, and names in other case are the same where the disk says so.
    """
    one, other = _whole(one), _whole(other)
    if _is_same(one, other):
        return "is"
    if any(_is_same(parent, other) for parent in one.parents):
        return "lies in"
    return "holds" if any(_is_same(parent, one) for parent in other.parents) else None


def _whole(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return os.path.normcase(one) == os.path.normcase(other)
