"""Pages that `make docs` makes: home, contributing and changelog from the root, the settings from the code."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from flatlora_diffusion.config import TrainConfig, choices_of, commands

ROOT = Path(__file__).parents[1]
VERBS = {
    "generate": commands.GenerateConfig,
    "compare": commands.CompareConfig,
    "flatness": commands.FlatnessConfig,
    "average": commands.AverageConfig,
    "merge": commands.MergeConfig,
    "resize": commands.ResizeConfig,
    "extract": commands.ExtractConfig,
    "export": commands.ExportConfig,
    "import": commands.ImportConfig,
    "inspect": commands.InspectConfig,
    "caption": commands.CaptionConfig,
    "doctor": commands.DoctorConfig,
}
PYTHON = ("FlatLora", "FlatLoraCallback", "TrainConfig", "train", "peft_flatness", "LandscapeConfig", "ConfigError")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    pages = {
        "index.md": from_root("README.md"),
        "contributing.md": from_root("CONTRIBUTING.md"),
        "changelog.md": from_root("CHANGELOG.md"),
        "reference/settings.md": settings_page(),
        "reference/python.md": python_page(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page of `docs/` with its links to files of the root as they are in the site; other files have no page."""
    markdown = markdown.replace("](../CONTRIBUTING.md)", "](contributing.md)")
    markdown = markdown.replace("](../CHANGELOG.md)", "](changelog.md)")
    return re.sub(r"\[([^]]+)\]\(\.\./(?:examples|samples|notebooks)/[^)]*\)", r"\1", markdown)


def from_root(name: str) -> str:
    """A page of the root, its links as they are from `docs/`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("](CONTRIBUTING.md)", "](contributing.md)").replace("](CHANGELOG.md)", "](changelog.md)")
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:|#)(?!\S+\.(?:md|png|webp)\b)[^)\s]+\)", r"\1", text)


def settings_page() -> str:
    """Every setting of `flatlora train` by section, then those of the other verbs."""
    lines = [
        "# All settings",
        "",
        "Each setting is a flag `--NAME`, a key of `config.json`, and a field of the app's form.",
    ]
    for part in fields(TrainConfig):
        section = typing.get_type_hints(TrainConfig)[part.name]
        lines += ["", f"## train: {part.name}", "", *table(section)]
    for verb, section in VERBS.items():
        lines += ["", f"## {verb}", "", *table(section)]
    return "\n".join(lines) + "\n"


def table(section: Any) -> Iterator[str]:
    """A row for each setting of a section."""
    yield "| setting | default | allowed | what it does |"
    yield "|---|---|---|---|"
    hints = typing.get_type_hints(section)
    for item in fields(section):
        if item.metadata:
            cells = (f"`{item.name}`", default(item), allowed(item, hints[item.name]), item.metadata["help"])
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def default(item: Field[Any]) -> str:
    value = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
    return "" if value is None or value == () else f"`{value}`"


def allowed(item: Field[Any], hint: Any) -> str:
    """The choices of a setting, or its bounds."""
    if choices := choices_of(hint):
        return ", ".join(f"`{choice}`" for choice in choices)
    low, high = item.metadata["min"], item.metadata["max"]
    bounds = [f"at least {low:g}"] if low is not None else []
    return " and ".join([*bounds, *([f"at most {high:g}"] if high is not None and high < 2**60 else [])])


def python_page() -> str:
    return "# Python\n\n" + "\n\n".join(f"::: flatlora_diffusion.{home(name)}" for name in PYTHON) + "\n"


def home(name: str) -> str:
    """Where a public name is defined, below the package."""
    import flatlora_diffusion

    return getattr(flatlora_diffusion, name).__module__.removeprefix("flatlora_diffusion.") + f".{name}"
