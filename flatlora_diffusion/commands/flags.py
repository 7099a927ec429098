"""The flags of settings: every setting is one, and each value is checked as it is read.

`--name VALUE` or `--name=VALUE`, with `-` for `_` too; several values follow one another; a switch is `--name`,
`--no_name` or `--name false`. Of a flag that is given twice the last one counts, but lines add up.
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
"""The title of those that are in no section."""


@dataclass(frozen=True)
class Flag:
    """A setting with its type, what it is if it is not given, and the title of its section."""

    item: dataclasses.Field[Any]
    hint: Any
    default: Any
    section: str

    @property
    def name(self) -> str:
        return self.item.name

    @property
    def is_switch(self) -> bool:
        return kind_of(self.hint) is bool

    @property
    def is_several(self) -> bool:
        return typing.get_origin(kind_of(self.hint)) is tuple

    def value(self, texts: Sequence[str]) -> Any:
        """The value that `texts` give. Raises ConfigError, naming the flag, for one that the setting cannot have."""
        if not self.is_several:
            return self._read(self.hint, texts[0])
        hint = typing.get_args(kind_of(self.hint))[0]
        read = tuple(self._read(hint, text) for text in texts)
        for place, text in enumerate(texts):
            if read[place] in read[:place] and not self.item.metadata.get("may_repeat"):
                raise ConfigError(f"--{self.name} has {shlex.quote(text)} twice; give each value once")
        return read

    def _read(self, hint: Any, text: str) -> Any:
        try:
            value = read_value(self.name, hint, text)
            check_setting(self.item, hint, value)
        except SettingError as error:
            raise ConfigError(f"--{self.name} {shlex.quote(text)} {error.why}") from error
        return value


def flags_of(settings: Any, section: str = FLAGS) -> dict[str, Flag]:
    """A flag for each setting, by its name, with the values of `settings` and of its sections as the defaults."""
    hints = typing.get_type_hints(type(settings))
    own = {item.name: getattr(settings, item.name) for item in fields(settings)}
    found = {
        item.name: Flag(item, hints[item.name], own[item.name], section) for item in fields(settings) if item.metadata
    }
    for item in fields(settings):
        if not item.metadata:
            title = (type(own[item.name]).__doc__ or "").rstrip(".")
            found |= flags_of(own[item.name], title)
    return found


def with_values(settings: Any, given: Mapping[str, Any]) -> Any:
    """`settings` with the values that are `given` for them and for their sections."""
    changes = {}
    for item in fields(settings):
        if not item.metadata:
            changes[item.name] = with_values(getattr(settings, item.name), given)
        elif item.name in given:
            changes[item.name] = given[item.name]
    return dataclasses.replace(settings, **changes)


def read_flags(words: Sequence[str], flags: Mapping[str, Flag], first: str | None = None) -> dict[str, Any]:
    """The values that a command line gives, by name; words of no flag are those of the setting `first`.

    Raises ConfigError, one sentence, for a flag that is not among `flags` and for a value that it cannot have.
    """
    given: dict[str, Any] = {}
    bare: list[str] = []
    left = deque(words)
    while left:
        word = left.popleft()
        found = _FLAG.fullmatch(word)
        if found is None:
            bare.append(word)
            continue
        name, text = found[1].replace("-", "_"), found[2]
        flag = flags.get(name)
        if flag is not None:
            given[name] = _value(flag, text, left, given.get(name))
        else:
            given[_switched_off(name, text, flags)] = False
    return given | _bare(bare, flags, first)


def _value(flag: Flag, text: str | None, left: deque[str], before: Any) -> Any:
    """The value of a flag, with what it takes of the words that are `left`."""
    if flag.is_switch:
        if text is None:
            text = left.popleft() if left and left[0].lower() in ("true", "false") else "true"
        return flag.value([text])
    if flag.is_several:
        return flag.value(_values(left) if text is None else [text])
    if text is None:
        if not left or _FLAG.fullmatch(left[0]):
            raise ConfigError(f"--{flag.name} needs a value")
        text = left.popleft()
    is_more = flag.item.metadata.get("is_multiline") and before is not None
    return flag.value([f"{before}\n{text}" if is_more else text])


def _values(left: deque[str]) -> list[str]:
    found = []
    while left and not _FLAG.fullmatch(left[0]):
        found.append(left.popleft())
    return found


def _switched_off(name: str, text: str | None, flags: Mapping[str, Flag]) -> str:
    """The switch that `--no_NAME` means."""
    flag = flags.get(name.removeprefix(_OFF)) if name.startswith(_OFF) else None
    if flag is not None and flag.is_switch and text is None:
        return flag.name
    near = difflib.get_close_matches(name, flags, n=1)
    advice = f"; is --{near[0]} meant?" if near else "; --help-all lists all"
    raise ConfigError(f"there is no flag --{name}{why_removed(name) or advice}")


def _bare(words: Sequence[str], flags: Mapping[str, Flag], first: str | None) -> dict[str, Any]:
    if not words:
        return {}
    if first is None or (len(words) > 1 and not flags[first].is_several):
        raise ConfigError(f"{words[0 if first is None else 1]!r} follows no flag that takes it; see --help")
    return {first: flags[first].value(words)}
