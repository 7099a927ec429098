"""Run ids: the run folder's path below the runs folder, `my-run`, or `demo/lora/seed-0` for a run of a comparison."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.storage.run_dir import MEMBER, RunDir

IMPORTED = "imported"  # the method of a LoRA from elsewhere
MAX_NAME_LENGTH = 60  # of a new run, and of the name to show; "-flat-lora" is put behind it
_PART = re.compile(r"[^./\\:][^/\\:]{0,199}")
_MAX_DEPTH = 8
_MAX_FOLDERS = 10_000  # looked into, should somebody take the whole disk for the runs folder
_MAX_ID_BYTES = 240  # bytes of an id as one folder name, with room for the trash's number
_OF_A_RUN = re.compile(r"checkpoint-.*|images|logs")


def folder_of(root: Path, run_id: str) -> Path:
    """The run's folder. Raises ConfigError for an id that does not name a place in `root`, links included."""
    folder = root.joinpath(*run_id.split("/")) if _is_id(run_id) else None
    if folder is None or not _is_inside(root, folder):
        raise ConfigError(f"{run_id!r} is not the name of a run; it must be a folder in the runs folder")
    return folder


def checked_text(what: str, text: str, most: int = MAX_NAME_LENGTH) -> str:
    """`text` without blanks around it. Raises ConfigError when it is too long or cannot be seen as it is."""
    text = text.strip()
    if len(text) > most:
        raise ConfigError(f"the {what} has {len(text)} letters; {most} at most")
    hidden = next((letter for letter in text if not letter.isprintable()), None)
    if hidden is not None:
        raise ConfigError(f"the {what} has the character U+{ord(hidden):04X}, which cannot be seen; write it without")
    return text


def is_run(folder: Path) -> bool:
    """A model's folder has a config.json too, so that alone does not make a run."""
    run = RunDir(folder)
    return run.config_file.is_file() and run.manifest_file.is_file()


def run_ids(root: Path, looked_into: list[Path] | None = None) -> Iterator[str]:
    """The ids of the run folders below `root`, shallow folders first.

    Skips links, hidden folders, earlier runs that were renamed, and members.

    Args:
        looked_into: receives the folders that the result depends on.
    """
    waiting = deque([("", root)])
    for _ in range(_MAX_FOLDERS):
        if not waiting:
            return
        above, folder = waiting.popleft()
        if looked_into is not None:
            looked_into.append(folder)
        for path in _folders(folder):
            run_id = f"{above}/{path.name}" if above else path.name
            if not _is_id(run_id) or (above and path.name.startswith(("earlier-", "holdout-fold-", MEMBER))):
                continue
            if is_run(path) and _is_inside(root, path):
                yield run_id
            elif _OF_A_RUN.fullmatch(path.name) and is_run(folder):
                continue
            waiting.append((run_id, path))


def safe_name(wanted: str) -> str:
    """`wanted` as the name of a folder on any system: letters, digits, `-`, `_` and inner `.`."""
    return RunDir(Path("run")).lora_name(wanted.strip() or None)


def private_name(run_id: str) -> str:
    """The id as a single folder name."""
    return run_id.replace("%", "%25").replace("/", "%2F")


def run_id_of(private: str) -> str:
    """The inverse of `private_name`."""
    return private.replace("%2F", "/").replace("%25", "%")


def size_of(folder: Path) -> int:
    """Bytes on the disk; 0 if the folder is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _is_inside(root: Path, folder: Path) -> bool:
    return folder.resolve().is_relative_to(root.resolve())


def _is_id(text: str) -> bool:
    parts = text.split("/")
    is_short = len(parts) <= _MAX_DEPTH and len(private_name(text).encode(errors="replace")) <= _MAX_ID_BYTES
    # Control and format characters make different names look alike.
    return is_short and all(part.isprintable() and _PART.fullmatch(part) for part in parts)


def _folders(folder: Path) -> list[Path]:
    """The visible folders in `folder`, without links; empty if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            names = [one.name for one in entries if not one.name.startswith(".") and one.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]
