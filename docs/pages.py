"""Pages that `make docs` generates: home, contributing and changelog from the root, all settings from the code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flatlora_diffusion.commands.flags import Flag, flags_of
from flatlora_diffusion.commands.help_page import bounds
from flatlora_diffusion.config import TrainConfig, choices_of, commands, help_of

ROOT = Path(__file__).parents[1]
VERBS = {
    "generate": commands.GenerateConfig,
    "compare": commands.CompareConfig,
    "evidence": commands.EvidenceConfig,
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


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages (a hook of mkdocs)."""
    from mkdocs.structure.files import File  # of the extra `docs`

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
    """Adapt the links of a page to the site (a hook of mkdocs); links to files without a page become text."""
    markdown = markdown.replace("](../CONTRIBUTING.md)", "](contributing.md)")
    markdown = markdown.replace("](../CHANGELOG.md)", "](changelog.md)")
    return re.sub(r"\[([^]]+)\]\(\.\./(?:examples|samples|notebooks)/[^)]*\)", r"\1", markdown)


def from_root(name: str) -> str:
    """Read a page of the root and make its links relative to `docs/`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("](CONTRIBUTING.md)", "](contributing.md)").replace("](CHANGELOG.md)", "](changelog.md)")
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:|#)(?!\S+\.(?:md|png|webp)\b)[^)\s]+\)", r"\1", text)


def settings_page() -> str:
    """Return the page of all settings: of `flatlora train` by section, then of the other verbs."""
    lines = ["# All settings", "", "Each setting of `train` is a flag `--NAME` and a key of `config.json`."]
    for section, flags in by_section(TrainConfig()).items():
        lines += ["", f"## train: {section}", "", *table(flags)]
    for verb, settings in VERBS.items():
        lines += ["", f"## {verb}", "", *table(flags_of(settings()).values())]
    return "\n".join(lines) + "\n"


def by_section(settings: Any) -> dict[str, list[Flag]]:
    """Group the flags of `settings` by the title of their section."""
    sections: dict[str, list[Flag]] = {}
    for flag in flags_of(settings).values():
        sections.setdefault(flag.section, []).append(flag)
    return sections


def table(flags: Iterable[Flag]) -> Iterator[str]:
    """Yield the lines of a table with a row per flag."""
    yield "| setting | default | allowed | what it does |"
    yield "|---|---|---|---|"
    for flag in flags:
        default = "" if flag.default in (None, ()) else f"`{flag.default}`"
        allowed = ", ".join(f"`{choice}`" for choice in choices_of(flag.hint)) or bounds(flag)
        cells = (f"`{flag.name}`", default, allowed, help_of(flag.field, flag.hint))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def python_page() -> str:
    """Return the page of the Python interface, whose docstrings mkdocstrings inserts."""
    return "# Python\n\n" + "\n\n".join(f"::: flatlora_diffusion.{home(name)}" for name in PYTHON) + "\n"


def home(name: str) -> str:
    """Return the path of a public name within the package."""
    import flatlora_diffusion

    return getattr(flatlora_diffusion, name).__module__.removeprefix("flatlora_diffusion.") + f".{name}"
