"""What a setting is: default, help and bounds in one place, and the errors that tell what is wrong with a value."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, Unpack, get_args

from flatlora_diffusion.config.removed import why_removed

KIND_NAMES: dict[type, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
"""The types of settings as people read them."""
_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """What comes with the program: inside of the package where it is installed, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parent / name


SAMPLES = shipped("samples")


class ConfigError(ValueError):
    """Something the user can put right: the message says what, and what is allowed."""

    exit_code = 2


class SettingError(ConfigError):
    """A value that a setting cannot have; `why` is the rest of the sentence behind name and value."""

    def __init__(self, name: str, value: object, why: str) -> None:
        super().__init__(name, value, why)
        self.name, self.value, self.why = name, value, why

    def __str__(self) -> str:
        return f"{self.name}={self.value!r} {self.why}"


class RunError(RuntimeError):
    """A run that had to stop; the message says why and what to do."""

    exit_code = 1


class StoppedError(RunError):
    """A run that was asked to stop, and has saved what it needs to go on."""

    exit_code = 3


class Traits(TypedDict, total=False):
    """What others must know of a setting; what is left out is not so."""

    place: Literal["read", "written", "model", "run", "part"]
    """What it names on disk: a file or folder that is read; a folder that is filled; a model or data set, which may be
    a hub id too; the run folder; or no path, but a part of one."""
    is_secret: bool  # never saved
    free_on_resume: bool  # may differ when a run goes on: none of it alters the steps that were taken
    is_remedy: bool  # the advice for a run that failed says to change it: the steps to come are others than without
    is_settled: bool  # a run that leaves it open settles it before anything is built
    is_shared: bool  # the same for all arms of an experiment, which sets it, pairs by it or could not measure without
    is_lines: bool  # a text for each line; a command line gives them one by one too
    stays_open: bool  # a place that a run goes on reading
    names_base: bool  # says which base is meant, of which there is a fingerprint
    only_loads: bool  # how the base is loaded; what it is stays the same
    before: Any  # what runs did that were saved before there was this setting
    repeats: bool  # a value may stand in it more than once
    moves: Literal["weights", "draws"]  # with another value the LoRA's first weights, or the draws, are others


def setting(
    default: Any, help: str, min: float | None = None, max: float | None = None, **traits: Unpack[Traits]
) -> Any:
    """A dataclass field with its help, its inclusive bounds and its traits."""
    return field(default=default, metadata={"help": help, "min": min, "max": max, **traits})


class Choice(str):
    """The type of a setting whose choices are the names of a registry's rows; its values are plain texts.

    Each row has a `help`.
    """

    rows: ClassVar[Mapping[str, Any]] = {}


def function_at(path: str) -> Callable[..., Any]:
    """The function that a registry's row names as `module:function`; its module is imported now."""
    module, name = path.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


class Section:
    """Checks the type, the choices and the bounds of every setting of a dataclass when it is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            if item.metadata:
                check_setting(item, hints[item.name], getattr(self, item.name))


def choices_of(hint: Any) -> tuple[str, ...]:
    """The words that a setting of this type may be; empty for a setting that is no choice."""
    kind = kind_of(hint)
    if isinstance(kind, type) and issubclass(kind, Choice):
        return tuple(kind.rows)
    return get_args(kind) if typing.get_origin(kind) is Literal else ()


def help_of(item: dataclasses.Field[Any], hint: Any) -> str:
    """The help of a setting, and of each of its choices that has a row in a registry."""
    kind, text = kind_of(hint), str(item.metadata["help"])
    if isinstance(kind, type) and issubclass(kind, Choice):
        return f"{text}: " + "; ".join(row.help for row in kind.rows.values())
    return text


def kind_of(hint: Any) -> Any:
    """The type of a setting that may be None as well, or of one that may not."""
    return next(kind for kind in _kinds(hint) if kind is not types.NoneType)


def is_optional(hint: Any) -> bool:
    """Whether a setting of this type may be None."""
    return types.NoneType in _kinds(hint)


def read_value(name: str, hint: Any, text: str) -> Any:
    """The value that `text` gives a setting of this type, choices in any case; not checked any further.

    Raises SettingError for a text that is no number, or neither true nor false, where one is wanted.
    """
    if text == "None" and is_optional(hint):
        return None
    kind = kind_of(hint)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise SettingError(name, text, f"must be {KIND_NAMES[bool]}")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            raise SettingError(name, text, f"must be {KIND_NAMES[kind]}") from error
    return text.lower() if text.lower() in choices_of(hint) else text


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union (`X | None`, also in its older form that `Literal[...] | None` has), or the one type."""
    return get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def check_setting(item: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    """Raises SettingError for a value that is not of the setting's type, none of its choices or out of its bounds."""
    if value is None and is_optional(hint):
        return
    kind = kind_of(hint)
    if typing.get_origin(kind) is tuple:
        _check_each(item, get_args(kind)[0], value)
        return
    if choices := choices_of(hint):
        if value not in choices:
            raise SettingError(item.name, value, f"is not one of {', '.join(choices)}{why_removed(item.name, value)}")
        return
    if not _is_a(value, kind):
        raise SettingError(item.name, value, f"must be {KIND_NAMES[kind]}")
    low, high = item.metadata["min"], item.metadata["max"]
    if kind is float and not math.isfinite(value):
        raise SettingError(item.name, value, "must be a finite number")
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise SettingError(item.name, value, f"is out of range: it must be {allowed}")


def _check_each(item: dataclasses.Field[Any], kind: Any, values: Any) -> None:
    if not isinstance(values, tuple):
        raise SettingError(item.name, values, "must be a tuple of values")
    for value in values:
        check_setting(item, kind, value)
        if values.count(value) > 1 and not item.metadata.get("repeats"):
            raise ConfigError(f"{item.name} has {value!r} twice; give each value once")


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
