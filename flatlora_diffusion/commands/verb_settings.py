"""Reads the settings of verbs that do not train, and contains the first steps that all verbs share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar

from flatlora_diffusion.commands.flags import flags_of, read_flags, with_values
from flatlora_diffusion.commands.help_page import HelpPage, requested_help, show_help
from flatlora_diffusion.config import ModelConfig

Settings = TypeVar("Settings")

logger = logging.getLogger(__name__)


def verb_settings(default: Settings, page: HelpPage, arguments: Sequence[str]) -> Settings:
    """Apply a verb's command line to `default`; print help and exit if requested.

    Raises:
        ConfigError: A flag or value is invalid.
    """
    flags, kind = flags_of(default), requested_help(arguments)
    if kind:
        show_help(page, flags, kind)
    settings: Settings = with_values(default, read_flags(arguments, flags, page.positional))
    return settings


def log_base(model: ModelConfig, has_remedy: bool = True) -> None:
    """Log the base's title; if `has_remedy`, with how to replace an included base."""
    from flatlora_diffusion.families.registry import base_line, base_title

    logger.info("%s", base_line(model) if has_remedy else f"base: {base_title(model)}")


def hide_library_bars() -> None:
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
