"""The settings of any verb but `train`, made from `config.py`, and what all verbs share before they begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Settings = TypeVar("Settings")


def verb_settings(
    kind: type[Settings], verb: str, description: str, arguments: Sequence[str], default: Settings | None = None
) -> Settings:
    """The settings of a verb; prints help or an unknown flag and exits as argparse does."""
    import tyro

    return tyro.cli(
        kind,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        prog=f"flatlora {verb}",
        description=description,
        default=tyro.MISSING_NONPROP if default is None else default,
    )


def with_file(arguments: list[str]) -> list[str]:
    """A first argument without a flag is the file."""
    return ["--file", *arguments] if arguments and not arguments[0].startswith("-") else arguments


def hide_library_bars() -> None:
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
