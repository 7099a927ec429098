"""The Dockerfile, read: what is downloaded and trained outlives the container, and no layer is made to be removed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "Dockerfile").read_text(encoding="utf-8")
STEPS = [
    tuple(step.split(maxsplit=1))
    for step in re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if step.strip()
]


def given(instruction: str) -> list[str]:
    return [argument for name, argument in STEPS if name == instruction]


def test_the_hub_s_cache_and_the_runs_are_volumes_of_the_user_that_the_command_mounts() -> None:
    volumes = {volume for argument in given("VOLUME") for volume in shlex.split(argument)}
    variables = dict(word.split("=", 1) for argument in given("ENV") for word in shlex.split(argument))
    (workdir,) = given("WORKDIR")
    assert {variables["HF_HOME"], workdir} == volumes
    (user,) = given("USER")
    (made,) = (argument for argument in given("RUN") if "useradd" in argument)
    _, owned = made.split(f"chown {user} ")
    assert set(shlex.split(owned)) == volumes
    assert STEPS.index(("RUN", made)) < STEPS.index(("USER", user))
    (command,) = re.findall(r"^# Run: .*(?:\n#   .*)*", TEXT, re.MULTILINE)
    assert set(re.findall(r"-v \S+:(\S+)", command)) == volumes


def test_the_sources_are_mounted_so_that_no_layer_holds_what_is_removed() -> None:
    assert given("COPY") + given("ADD") == []
    assert not any(re.search(r"\brm\b", argument) for argument in given("RUN"))
    installed = [argument for argument in given("RUN") if "pip install" in argument]
    assert all(argument.startswith("--mount=type=bind,") and "--no-cache-dir" in argument for argument in installed)
    torch, program = installed
    assert "source=requirements.lock," in torch, "PyTorch is installed anew when its version changes, and only then"
    assert "/source[app,report]" in program
