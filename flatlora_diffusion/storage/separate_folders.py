"""Checks that output folders and image folders are separate.

A picture written into an image folder would become a training image, and images inside a run folder would be deleted
together with the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from flatlora_diffusion.config import ConfigError

Relation = Literal["is", "lies in", "holds"]


def check_separate(
    setting: str,
    written: Path,
    other: str,
    images: Iterable[Path],
    refused: tuple[Relation, ...] = ("is", "lies in", "holds"),
) -> None:
    """Raise ConfigError if an output folder has a forbidden relation to an image folder.

    Args:
        setting: the setting whose value is `written`.
        other: the setting that names the folders `images`.
        refused: the forbidden relations.
    """
    for folder in images:
        found = relation(written, folder)
        if found in refused:
            real = _real_path(folder)
            suggestion = real.parent / f"{real.name}-{setting.removesuffix('_dir')}"
            raise ConfigError(
                f"{setting}={str(written)!r} {found} {other}={str(folder)!r}: images and output must be in separate "
                f"folders; give another folder, such as {str(suggestion)!r}"
            )


def relation(path: Path, other: Path) -> Relation | None:
    """Return how `path` relates to `other`, whether they exist or not; None if they are separate.

    Symbolic links are followed, and case is ignored on case-insensitive disks.
    """
    path, other = _real_path(path), _real_path(other)
    if _is_same(path, other):
        return "is"
    if any(_is_same(parent, other) for parent in path.parents):
        return "lies in"
    return "holds" if any(_is_same(parent, path) for parent in other.parents) else None


def _real_path(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _is_same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # a missing path
        return os.path.normcase(path) == os.path.normcase(other)
