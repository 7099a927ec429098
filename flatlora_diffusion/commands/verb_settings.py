"""The settings of any verb but those that train, made from `config`, and what all verbs share before they begin."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar

from flatlora_diffusion.commands.flags import flags_of, read_flags, with_values
from flatlora_diffusion.commands.help_page import Page, help_wanted, show_help
from flatlora_diffusion.config import ModelConfig

Settings = TypeVar("Settings")

logger = logging.getLogger(__name__)


def verb_settings(default: Settings, page: Page, arguments: Sequence[str]) -> Settings:
    """`default` with what a verb's command line gives; prints help and exits if that is asked for.

    Raises ConfigError, one sentence, for a flag or a value that cannot be.
    """
    flags, wanted = flags_of(default), help_wanted(arguments)
    if wanted:
        show_help(page, flags, wanted)
    read: Settings = with_values(default, read_flags(arguments, flags, page.first))
    return read


def say_base(model: ModelConfig, has_remedy: bool = True) -> None:
    """Log the base by what it is; a verb's first line. has_remedy: for the tiny one, how to give another."""
    from flatlora_diffusion.sdxl.base_title import base_line, base_title

    logger.info("%s", base_line(model) if has_remedy else f"base: {base_title(model)}")


def hide_library_bars() -> None:
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
