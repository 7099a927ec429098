"""CONTRIBUTING.md has the layers of the architecture, and what the README links to is there."""

from __future__ import annotations

import re
from pathlib import Path

from test_architecture import FLOORS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_floors_are_those_of_the_architecture() -> None:
    table = re.findall(r"^\| (`[^|]+`) \|", TEXT, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in table] == FLOORS


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)\s#]*)(?:#([^)\s]+))?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    for name, heading in links:
        path = name or "README.md"  # a heading of its own
        assert (ROOT / path).exists(), path
        if heading:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], heading
