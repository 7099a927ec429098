"""Atomic file writes, clean-up after killed processes, and error messages for folders that cannot be written.

Imports no torch, so that run folders can be inspected without it.
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

_PARTIAL = re.compile(r"\..+\.[0-9]+\.part")
_SYSTEM_ERROR = re.compile(r"I/O error: (.+) \(os error ([0-9]+)\)", re.DOTALL)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; on success it is flushed to disk and renamed to `path`.

    Raises:
        OSError: the file cannot be written; a SafetensorError is converted.
    """
    # The thread's id, because two threads may write the same file.
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.part")
    try:
        temporary.touch()
        # The mode that the umask allows; safetensors would make the file readable by its owner only.
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise _as_system_error(error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `\\n` line ends on every system."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file's contents as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_partial_files(folder: Path, seconds: float = 0.0) -> None:
    """Delete temporary files that killed processes left in `folder`.

    Args:
        seconds: minimum age of a file; needed where other processes may be writing into the folder.
    """
    for path in folder.glob(".*.part") if folder.is_dir() else ():
        with suppress(OSError):
            if _PARTIAL.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime >= seconds:
                path.unlink()


@contextmanager
def explain_write_errors(folder: Path, setting: str) -> Iterator[None]:
    """Convert an OSError of `folder`, the value of `setting`, to a ConfigError that names both."""
    try:
        yield
    except OSError as error:
        if not concerns_folder(error, folder):
            raise
        reason = error.strerror or error
        raise ConfigError(f"{setting}={str(folder)!r} cannot be written: {reason}; give another folder") from error


def concerns_folder(error: OSError, folder: Path) -> bool:
    """Whether the error can be about `folder` or a file in it; errors of connections are OSErrors too."""
    if isinstance(error, ConnectionError | TimeoutError) or (error.errno is None and type(error) is not OSError):
        return False
    if not isinstance(error.filename, str):
        return True
    file, folder = Path(error.filename).absolute(), folder.absolute()
    return file.is_relative_to(folder) or folder.is_relative_to(file)  # a parent has to be created or opened first


def check_writable(folder: Path, setting: str) -> None:
    """Raise ConfigError if no file can be created in `folder`, the value of `setting`.

    Meant to be called before long work. Leaves neither files nor new folders behind.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with explain_write_errors(folder, setting):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe.{threading.get_native_id()}.part"
            probe.touch()
            probe.unlink()
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _as_system_error(error: SafetensorError) -> OSError:
    match = _SYSTEM_ERROR.search(str(error))
    return OSError(str(error)) if match is None else OSError(int(match[2]), match[1])
