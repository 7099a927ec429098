"""The lock file: versions that any system can install, within the ranges that are declared."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flatlora_diffusion.storage.versions import LOCK, last_tested

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
DIRECT = [one for one in map(Requirement, ASKED) if one.name not in (PROJECT["name"], "setuptools")]


@pytest.mark.parametrize("asked", DIRECT, ids=str)
def test_every_library_was_tested_at_a_version_within_its_range(asked: Requirement) -> None:
    assert asked.specifier.contains(last_tested()[canonicalize_name(asked.name)])


def test_it_binds_no_other_system_or_accelerator() -> None:
    lines = (ROOT / LOCK).read_text(encoding="utf-8").splitlines()
    bound = [line for line in lines if not line.startswith("#")]
    assert len(bound) > 50
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in bound), "neither hashes, files nor local versions"
    assert not [line for line in bound if re.match(r"torch|nvidia|triton|flatlora", line)], "a user's own build stays"


def test_it_was_made_with_the_oldest_python() -> None:
    """A version that an older Python cannot install would be none for its users."""
    assert PROJECT["requires-python"] == f">={last_tested()['python']}"


def test_it_is_made_by_one_command_from_the_environment() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lock.py"], capture_output=True, text=True, check=True
    ).stdout
    names = {re.split("==", line.removeprefix("# "))[0].lower() for line in made.splitlines() if "==" in line}
    assert {"python", "torch", "diffusers", "gradio", "pytest"} <= names
    assert "+" not in made
