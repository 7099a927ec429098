"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(aside)` on a neighbour of `path`, flush it to disk, then rename it over `path`.

    The file is readable by whom the umask allows; safetensors would make it readable by its owner alone.

    Raises OSError when it cannot be written, which safetensors calls otherwise.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # what the umask leaves of 0666, without setting the umask to learn it
        write(aside)
        os.chmod(aside, mode)
        with open(aside, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
