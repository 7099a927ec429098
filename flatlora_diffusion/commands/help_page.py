"""Formats `--help` and `--help-all`: the flags with their purpose, bounds and defaults."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from flatlora_diffusion.commands.flags import FLAGS, Flag
from flatlora_diffusion.config import choices_of, help_of

HELP = {"-h": "common", "--help": "common", "--help-all": "all", "--help_all": "all"}
_UNBOUNDED = 2**63 - 1  # the upper bound of seeds
HelpKind = Literal["common", "all"]


@dataclass(frozen=True)
class HelpPage:
    """The help of a verb without its flags.

    Attributes:
        usage: The text between the verb and its flags in the usage line.
        positional: The setting of the words without a flag.
        common: The flags that `--help` shows; empty for all.
    """

    verb: str
    text: str
    usage: str = ""
    positional: str | None = None
    common: tuple[str, ...] = ()


def requested_help(words: Sequence[str]) -> HelpKind | None:
    """The kind of help that a command line requests, if any."""
    kinds = {HELP[word] for word in words if word in HELP}
    return "all" if "all" in kinds else "common" if kinds else None


def show_help(page: HelpPage, flags: Mapping[str, Flag], kind: HelpKind) -> NoReturn:
    """Print the help and exit."""
    try:
        print(help_text(page, flags, kind), flush=True)
    except BrokenPipeError:  # `| head` has ended; redirect stdout, because Python flushes it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def help_text(page: HelpPage, flags: Mapping[str, Flag], kind: HelpKind) -> str:
    """Format the help of a verb, with the flags grouped by section."""
    names = page.common if page.common and kind == "common" else tuple(flags)
    omitted = len(flags) - len(names)
    parser = argparse.ArgumentParser(
        prog=f"flatlora {page.verb}",
        usage=" ".join(filter(None, ("%(prog)s", page.usage, "[--FLAG VALUE ...]"))),
        description=page.text.replace("%", "%%"),
        epilog=f"--help-all shows {omitted} more flags." if omitted else None,
        add_help=False,
        formatter_class=_Formatter,
    )
    sections = {name: FLAGS if omitted else flags[name].section for name in names}
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(sections.values())}
    for name in sorted(names, key=lambda name: name != page.positional):
        _add(groups[sections[name]], flags[name], is_positional=name == page.positional)
    return parser.format_help().rstrip()


class _Formatter(argparse.HelpFormatter):
    """A formatter that does not break names and values at hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def _add(group: Any, flag: Flag, is_positional: bool) -> None:
    facts = "; ".join(filter(None, (bounds(flag), _default(flag))))
    text = (help_of(flag.field, flag.hint) + (f" ({facts})" if facts else "")).replace("%", "%%")
    if flag.is_switch:
        off = [f"--no_{flag.name}"] if flag.default else []
        group.add_argument(f"--{flag.name}", *off, action="store_true", help=text)
        return
    choices = choices_of(flag.hint)
    word = flag.name.split("_")[-1].upper().removesuffix("S" if flag.is_list else "")
    metavar = "{" + ",".join(choices) + "}" if choices else word
    name = flag.name if is_positional else f"--{flag.name}"
    group.add_argument(name, metavar=metavar, nargs="*" if flag.is_list else None, help=text)


def bounds(flag: Flag) -> str:
    """Describe the flag's range; empty if it is unbounded."""
    low, high = flag.field.metadata["min"], flag.field.metadata["max"]
    if low is None:
        return ""
    return f"{low:g} or more" if high is None or high >= _UNBOUNDED else f"{low:g} to {high:g}"


def _default(flag: Flag) -> str:
    if flag.is_switch:
        return "default: on" if flag.default else ""
    if flag.default in (None, "", ()):
        return ""
    return f"default: {' '.join(map(str, flag.default)) if flag.is_list else flag.default}"
