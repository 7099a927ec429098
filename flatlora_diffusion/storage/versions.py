"""The versions of this program and of its libraries, installed or run from a checkout; and those last tested."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from flatlora_diffusion.config import shipped

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROGRAM = "flatlora-diffusion"
LOCK = "requirements.lock"
_LIBRARIES = ("torch", "diffusers", "peft", "transformers")  # that figures depend on


def versions() -> dict[str, str]:
    """The version by package, this program's first; of a library that other trainers go without, none."""
    found = {name: installed(name) for name in _LIBRARIES}
    return {PROGRAM: __version__, **{name: number for name, number in found.items() if number is not None}}


def installed(package: str) -> str | None:
    """The version of a package; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def last_tested() -> dict[str, str]:
    """The versions that the whole suite last ran with, by package in lower case with dashes; `python` is one."""
    file = shipped(LOCK)
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.findall(r"^(?:# )?([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    return {name.lower().replace("_", "-"): number for name, number in found}


def required() -> list[Requirement]:
    """What this program needs without its extras. A checkout that is not installed tells no ranges."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in requires(PROGRAM) or []]
    except PackageNotFoundError:
        return [Requirement(name) for name in _LIBRARIES]
    return [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]


def _own_version() -> str:
    """The installed version; of a checkout that is not installed, what its pyproject.toml says, marked as that."""
    found = installed(PROGRAM)
    if found is not None:
        return found
    project = shipped("pyproject.toml")
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    declared = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return f"{declared[1]}+checkout" if declared else "unknown"


__version__ = _own_version()
