"""Versions of this program and its libraries: installed, required and last tested."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from flatlora_diffusion.config import shipped

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROGRAM = "flatlora-diffusion"
LOCK = "requirements.lock"
_LIBRARIES = ("torch", "diffusers", "peft", "transformers")  # results depend on them


def versions() -> dict[str, str]:
    """Return the version of this program and of each main library that is installed."""
    libraries = {name: installed_version(name) for name in _LIBRARIES}
    return {PROGRAM: __version__, **{name: number for name, number in libraries.items() if number is not None}}


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def last_tested() -> dict[str, str]:
    """Return the versions of the last full test run, including `python`, by normalized package name."""
    file = shipped(LOCK)
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    pins = re.findall(r"^(?:# )?([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    return {name.lower().replace("_", "-"): number for name, number in pins}


def required() -> list[Requirement]:
    """Return the requirements without extras; without version ranges in a checkout that is not installed."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in requires(PROGRAM) or []]
    except PackageNotFoundError:
        return [Requirement(name) for name in _LIBRARIES]
    return [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]


def _own_version() -> str:
    """Return the installed version, or `VERSION+checkout` from pyproject.toml in a checkout."""
    number = installed_version(PROGRAM)
    if number is not None:
        return number
    project = shipped("pyproject.toml")
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    declared = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return f"{declared[1]}+checkout" if declared else "unknown"


__version__ = _own_version()
