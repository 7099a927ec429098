"""Files that are written whole or not at all, whatever happens meanwhile, and what is left when the process is killed.

Needs no torch, so that run folders can be looked at without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flatlora_diffusion.config import ConfigError

_ASIDE = re.compile(r"\..+\.[0-9]+\.part")
_SYSTEM_ERROR = re.compile(r"I/O error: (.+) \(os error ([0-9]+)\)", re.DOTALL)


@contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write to while this is open; then it is flushed to disk and renamed over `path`.

    The file is readable by whom the umask allows; safetensors would make it readable by its owner alone.

    Raises OSError when it cannot be written, which safetensors calls otherwise.
    """
    aside = path.with_name(f".{path.name}.{threading.get_native_id()}.part")  # also two threads may write it at once
    try:
        aside.touch()
        mode = aside.stat().st_mode  # what the umask leaves of 0666, without setting the umask to learn it
        yield aside
        os.chmod(aside, mode)
        with open(aside, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except SafetensorError as error:
        raise _as_system_error(error) from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with the same bytes on every system."""
    with writing_whole(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a line's end."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def file_sha256(path: Path) -> str:
    """The SHA-256 of the file's contents, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_half_written(folder: Path, seconds: float = 0.0) -> None:
    """Remove what `writing_whole` was at in `folder` when its process was killed.

    In a folder that several processes write into, only what has lain there for as many `seconds` is surely that.
    """
    for path in folder.glob(".*.part") if folder.is_dir() else ():
        with suppress(OSError):
            if _ASIDE.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime >= seconds:
                path.unlink()


@contextmanager
def writing_into(folder: Path, setting: str) -> Iterator[None]:
    """Raises ConfigError in place of an OSError of `folder`, the value of `setting`."""
    try:
        yield
    except OSError as error:
        if not is_of(error, folder):
            raise
        reason = error.strerror or error
        raise ConfigError(f"{setting}={str(folder)!r} cannot be written: {reason}; give another folder") from error


def is_of(error: OSError, folder: Path) -> bool:
    """Whether the error is of a file in `folder`, as far as it says; a connection's is an OSError, too."""
    if isinstance(error, ConnectionError | TimeoutError) or (error.errno is None and type(error) is not OSError):
        return False
    file = error.filename
    return (
        not isinstance(file, str) or Path(file).absolute().is_relative_to(folder.absolute()) or _is_above(file, folder)
    )


def check_writable(folder: Path, setting: str) -> None:
    """Raises ConfigError, before anything that takes long, if no file can be made in `folder`, the value of `setting`.

    Leaves nothing there, and no folder that was not there.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with writing_into(folder, setting):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe.{threading.get_native_id()}.part"
            probe.touch()
            probe.unlink()
    finally:
        for place in missing:
            with suppress(OSError):
                place.rmdir()


def _is_above(file: str, folder: Path) -> bool:
    """Whether it is a parent of `folder`, which has to be made or opened for it."""
    return folder.absolute().is_relative_to(Path(file).absolute())


def _as_system_error(error: SafetensorError) -> OSError:
    found = _SYSTEM_ERROR.search(str(error))
    return OSError(str(error)) if found is None else OSError(int(found[2]), found[1])
