"""What `--help` and `--help-all` print: the flags with what they are for, what is allowed and what they are now."""

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

HELP = {"-h": "usual", "--help": "usual", "--help-all": "all", "--help_all": "all"}
_NO_LIMIT = 2**63 - 1  # of a seed
Wanted = Literal["usual", "all"]


@dataclass(frozen=True)
class Page:
    """What a verb's help says beside its flags.

    usage: what stands between the verb and its flags. first: the setting of the words without a flag. usual: the
    flags that `--help` shows, all of them if it is empty.
    """

    verb: str
    text: str
    usage: str = ""
    first: str | None = None
    usual: tuple[str, ...] = ()


def help_wanted(words: Sequence[str]) -> Wanted | None:
    """Which help is asked for, if one is."""
    found = {HELP[word] for word in words if word in HELP}
    return "all" if "all" in found else "usual" if found else None


def show_help(page: Page, flags: Mapping[str, Flag], wanted: Wanted) -> NoReturn:
    """Print the help and exit."""
    try:
        print(help_text(page, flags, wanted), flush=True)
    except BrokenPipeError:  # `| head` has read enough; Python would flush once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def help_text(page: Page, flags: Mapping[str, Flag], wanted: Wanted) -> str:
    """The help of a verb, with the flags that are wanted in groups by their section."""
    names = page.usual if page.usual and wanted == "usual" else tuple(flags)
    left_out = len(flags) - len(names)
    parser = argparse.ArgumentParser(
        prog=f"flatlora {page.verb}",
        usage=" ".join(filter(None, ("%(prog)s", page.usage, "[--FLAG VALUE ...]"))),
        description=page.text.replace("%", "%%"),
        epilog=f"--help-all shows {left_out} more flags." if left_out else None,
        add_help=False,
        formatter_class=_Whole,
    )
    sections = {name: FLAGS if left_out else flags[name].section for name in names}
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(sections.values())}
    for name in sorted(names, key=lambda name: name != page.first):
        _add(groups[sections[name]], flags[name], is_first=name == page.first)
    return parser.format_help().rstrip()


class _Whole(argparse.HelpFormatter):
    """Names and values are not broken at their hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def _add(group: Any, flag: Flag, is_first: bool) -> None:
    facts = "; ".join(filter(None, (bounds(flag), _default(flag))))
    text = (help_of(flag.item, flag.hint) + (f" ({facts})" if facts else "")).replace("%", "%%")
    if flag.is_switch:
        off = [f"--no_{flag.name}"] if flag.default else []
        group.add_argument(f"--{flag.name}", *off, action="store_true", help=text)
        return
    choices = choices_of(flag.hint)
    word = flag.name.split("_")[-1].upper().removesuffix("S" if flag.is_several else "")
    many = "*" if flag.is_several else None
    name = flag.name if is_first else f"--{flag.name}"
    group.add_argument(name, metavar="{" + ",".join(choices) + "}" if choices else word, nargs=many, help=text)


def bounds(flag: Flag) -> str:
    """What numbers the flag takes, in words; empty where all are allowed."""
    low, high = flag.item.metadata["min"], flag.item.metadata["max"]
    if low is None:
        return ""
    return f"{low:g} or more" if high is None or high >= _NO_LIMIT else f"{low:g} to {high:g}"


def _default(flag: Flag) -> str:
    if flag.is_switch:
        return "default: on" if flag.default else ""
    if flag.default in (None, "", ()):
        return ""
    return f"default: {' '.join(map(str, flag.default)) if flag.is_several else flag.default}"
