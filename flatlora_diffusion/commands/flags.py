"""Parses command-line flags: each setting is a flag, and each value is checked when it is read.

Syntax: `--name VALUE` or `--name=VALUE`, with `-` or `_`; a list takes several values; a switch is `--name`,
`--no_name` or `--name false`. If a flag is repeated the last value wins, except that lines are appended.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import typing
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from flatlora_diffusion.config import (
    ConfigError,
    SettingError,
    check_setting,
    kind_of,
    read_value,
    why_removed,
)

_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
_OFF = "no_"
FLAGS = "flags"
"""The title of the flags without a section."""


@dataclass(frozen=True)
class Flag:
    """A setting as a flag, with its type, its default and the title of its section."""

    field: dataclasses.Field[Any]
    hint: Any
    default: Any
    section: str

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def is_switch(self) -> bool:
        return kind_of(self.hint) is bool

    @property
    def is_list(self) -> bool:
        return typing.get_origin(kind_of(self.hint)) is tuple

    def value(self, texts: Sequence[str]) -> Any:
        """Parse `texts`. Raises ConfigError, naming the flag, for an invalid value."""
        if not self.is_list:
            return self._read(self.hint, texts[0])
        hint = typing.get_args(kind_of(self.hint))[0]
        values = tuple(self._read(hint, text) for text in texts)
        for index, text in enumerate(texts):
            if values[index] in values[:index] and not self.field.metadata.get("may_repeat"):
                raise ConfigError(f"--{self.name} contains {shlex.quote(text)} twice; give each value once")
        return values

    def _read(self, hint: Any, text: str) -> Any:
        try:
            value = read_value(self.name, hint, text)
            check_setting(self.field, hint, value)
        except SettingError as error:
            raise ConfigError(f"--{self.name} {shlex.quote(text)} {error.why}") from error
        return value


def flags_of(settings: Any, section: str = FLAGS) -> dict[str, Flag]:
    """Make a flag of each setting, with the values of `settings` and of its sections as defaults."""
    hints = typing.get_type_hints(type(settings))
    values = {item.name: getattr(settings, item.name) for item in fields(settings)}
    flags = {
        item.name: Flag(item, hints[item.name], values[item.name], section)
        for item in fields(settings)
        if item.metadata
    }
    for item in fields(settings):
        if not item.metadata:
            title = (type(values[item.name]).__doc__ or "").rstrip(".")
            flags |= flags_of(values[item.name], title)
    return flags


def with_values(settings: Any, given: Mapping[str, Any]) -> Any:
    """Replace the values of `settings` and of its sections by those in `given`."""
    changes = {}
    for item in fields(settings):
        if not item.metadata:
            changes[item.name] = with_values(getattr(settings, item.name), given)
        elif item.name in given:
            changes[item.name] = given[item.name]
    return dataclasses.replace(settings, **changes)


def read_flags(words: Sequence[str], flags: Mapping[str, Flag], positional: str | None = None) -> dict[str, Any]:
    """Parse a command line into values by name.

    Args:
        positional: The setting of the words without a flag.

    Raises:
        ConfigError: A flag is not among `flags`, or a value is invalid.
    """
    given: dict[str, Any] = {}
    positional_words: list[str] = []
    remaining = deque(words)
    while remaining:
        word = remaining.popleft()
        match = _FLAG.fullmatch(word)
        if match is None:
            positional_words.append(word)
            continue
        name, text = match[1].replace("-", "_"), match[2]
        flag = flags.get(name)
        if flag is not None:
            given[name] = _take_value(flag, text, remaining, given.get(name))
        else:
            given[_disabled_switch(name, text, flags)] = False
    return given | _positional(positional_words, flags, positional)


def _take_value(flag: Flag, text: str | None, remaining: deque[str], earlier: Any) -> Any:
    """Parse the value of a flag, taking it from the remaining words if necessary."""
    if flag.is_switch:
        if text is None:
            text = remaining.popleft() if remaining and remaining[0].lower() in ("true", "false") else "true"
        return flag.value([text])
    if flag.is_list:
        return flag.value(_take_values(remaining) if text is None else [text])
    if text is None:
        if not remaining or _FLAG.fullmatch(remaining[0]):
            raise ConfigError(f"--{flag.name} needs a value")
        text = remaining.popleft()
    is_appended = flag.field.metadata.get("is_multiline") and earlier is not None
    return flag.value([f"{earlier}\n{text}" if is_appended else text])


def _take_values(remaining: deque[str]) -> list[str]:
    values = []
    while remaining and not _FLAG.fullmatch(remaining[0]):
        values.append(remaining.popleft())
    return values


def _disabled_switch(name: str, text: str | None, flags: Mapping[str, Flag]) -> str:
    """The switch that `--no_NAME` turns off. Raises ConfigError for an unknown flag."""
    flag = flags.get(name.removeprefix(_OFF)) if name.startswith(_OFF) else None
    if flag is not None and flag.is_switch and text is None:
        return flag.name
    similar = difflib.get_close_matches(name, flags, n=1)
    hint = f"; did you mean --{similar[0]}?" if similar else "; --help-all lists all flags"
    raise ConfigError(f"there is no flag --{name}{why_removed(name) or hint}")


def _positional(words: Sequence[str], flags: Mapping[str, Flag], name: str | None) -> dict[str, Any]:
    if not words:
        return {}
    if name is None or (len(words) > 1 and not flags[name].is_list):
        raise ConfigError(f"unexpected argument {words[0 if name is None else 1]!r}; see --help")
    return {name: flags[name].value(words)}
