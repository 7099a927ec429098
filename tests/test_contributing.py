"""CONTRIBUTING.md is true: the paths, commands and names in it are there; so is what the README links to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_architecture import FLOORS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
QUOTED = sorted(set(re.findall(r"`([^`\n]+)`", TEXT)))


@pytest.mark.parametrize("path", [quoted for quoted in QUOTED if "/" in quoted and " " not in quoted])
def test_every_path_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_command_is_one_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = set(re.findall(r"^    make ([\w-]+)|`make ([\w-]+)`", TEXT, re.MULTILINE))
    assert commands
    for command in commands:
        assert f"\n{''.join(command)}:" in makefile


def test_the_floors_are_those_of_the_architecture() -> None:
    table = re.findall(r"^\| (`[^|]+`) \|", TEXT, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in table] == FLOORS


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("METRICS", "flatlora_diffusion/evaluation/metrics.py"),
        ("OWN_METRICS", "flatlora_diffusion/compare/evaluator.py"),
        ("_TOOLS", "flatlora_diffusion/lora_tools/tool_support.py"),
        ("TABLE", "tests/lora_tools/test_tool_support.py"),
        ("TARGET_SETS", "flatlora_diffusion/adapter/lora.py"),
        ("RUNS", "tests/commands/test_every_flag.py"),
    ],
)
def test_every_table_is_where_it_says(name: str, file: str) -> None:
    assert f"`{name}`" in TEXT
    assert f"`{file}`" in TEXT
    assert re.search(rf"^{name}\b.* = ", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)\s#]*)(?:#([^)\s]+))?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    for name, heading in links:
        path = name or "README.md"  # a heading of its own
        assert (ROOT / path).exists(), path
        if heading:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], heading
