"""The versions of this program and of the libraries that its figures depend on, installed or run from a checkout."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROGRAM = "flatlora-diffusion"
_LIBRARIES = ("torch", "diffusers", "peft", "transformers")


def versions() -> dict[str, str]:
    """The version by package, this program's first."""
    return {PROGRAM: __version__, **{name: version(name) for name in _LIBRARIES}}


def _own_version() -> str:
    """The installed version; of a checkout that is not installed, what its pyproject.toml says, marked as that."""
    try:
        return version(PROGRAM)
    except PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        text = project.read_text(encoding="utf-8") if project.is_file() else ""
        found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
        return f"{found[1]}+checkout" if found else "unknown"


__version__ = _own_version()
