"""Run ids: the run folder's path below the runs folder, `my-run`, or `demo/lora` for an arm of a comparison."""

from __future__ import annotations

import re
from pathlib import Path

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.run_dir import RunDir

LONGEST_NAME = 60  # of a new run, and of the name to show; "-flat-lora" is put behind it
_PART = re.compile(r"[^./\\:][^/\\:]{0,199}")
_MOST_PARTS = 2


def folder_of(root: Path, run_id: str) -> Path:
    """The run's folder. Raises ConfigError for an id that does not name a place in `root`, links included."""
    parts = run_id.split("/")
    is_name = len(parts) <= _MOST_PARTS and all(map(is_part, parts))
    folder = root.joinpath(*parts) if is_name else None
    if folder is None or not folder.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"{run_id!r} is not the name of a run; it must be a folder in the runs folder")
    return folder


def is_part(name: str) -> bool:
    """Whether a folder of this name may be a run: one that can be seen as it is, without control or format characters,
    with which a name would look like another.
    """
    return name.isprintable() and _PART.fullmatch(name) is not None


def checked_text(what: str, text: str, most: int = LONGEST_NAME) -> str:
    """`text` without blanks around it. Raises ConfigError when it is too long or cannot be seen as it is."""
    text = text.strip()
    if len(text) > most:
        raise ConfigError(f"the {what} has {len(text)} letters; {most} at most")
    hidden = next((letter for letter in text if not letter.isprintable()), None)
    if hidden is not None:
        raise ConfigError(f"the {what} has the character U+{ord(hidden):04X}, which cannot be seen; write it without")
    return text


def is_run_folder(folder: Path) -> bool:
    """A model's folder has a config.json too, so that alone does not make a run."""
    run = RunDir(folder)
    return run.config_file.is_file() and run.manifest_file.is_file()


def safe_name(wanted: str) -> str:
    """`wanted` as the name of a folder on any system: letters, digits, `-`, `_` and inner `.`."""
    return RunDir(Path("run")).lora_name(wanted.strip() or None)


def private_name(run_id: str) -> str:
    """One folder name for an id."""
    return run_id.replace("%", "%25").replace("/", "%2F")


def run_id_of(private: str) -> str:
    """The id that `private_name` was made of."""
    return private.replace("%2F", "/").replace("%25", "%")
