"""The definition of a setting (default, help, bounds, traits), its validation and the errors of invalid values."""

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
"""Names of the setting types in messages."""
_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Return the path of a data file: inside the installed package, or beside the package in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parent / name


SAMPLES = shipped("samples")


class ConfigError(ValueError):
    """An error that the user can fix; the message names the setting or file and the allowed values."""

    exit_code = 2


class SettingError(ConfigError):
    """An invalid value of a setting.

    Args:
        name: name of the setting.
        value: the invalid value.
        why: the end of the message, after `name=value`.
    """

    def __init__(self, name: str, value: object, why: str) -> None:
        super().__init__(name, value, why)
        self.name, self.value, self.why = name, value, why

    def __str__(self) -> str:
        return f"{self.name}={self.value!r} {self.why}"


class RunError(RuntimeError):
    """A run that had to stop; the message gives the reason and the remedy."""

    exit_code = 1


class StoppedError(RunError):
    """A run that stopped on request and can be resumed."""

    exit_code = 3


class Traits(TypedDict, total=False):
    """Properties of a setting besides default, help and bounds. An absent trait is false."""

    path_kind: Literal["read", "written", "model", "run", "part"]
    """A path to read, a folder to write to, a model or data set (path or hub id), the run folder, a part of a path."""
    is_secret: bool  # never saved
    free_on_resume: bool  # may change on resume, because it does not affect the steps so far
    retryable: bool  # may change on resume after a failure, although it affects the remaining steps
    is_resolved: bool  # None is replaced by a value before the run starts
    is_shared: bool  # equal in all arms of a comparison
    is_multiline: bool  # one text per line; the command line also accepts the flag several times
    read_at_runtime: bool  # a path that the run reads after its start
    identifies_base: bool  # selects the base model, whose fingerprint is saved
    loader_only: bool  # affects how the base is loaded, not its weights
    legacy_default: Any  # the value in runs saved before the setting existed
    may_repeat: bool  # a tuple that may contain a value twice
    affects: Literal["weights", "draws"]  # changes the initial LoRA weights, or the batches, noise and timesteps


def setting(
    default: Any, help: str, min: float | None = None, max: float | None = None, **traits: Unpack[Traits]
) -> Any:
    """Return a dataclass field with help, inclusive bounds and traits."""
    return field(default=default, metadata={"help": help, "min": min, "max": max, **traits})


class Choice(str):
    """The type of a setting whose choices are the keys of a registry; its values are plain strings.

    Each row of the registry has a `help`.
    """

    rows: ClassVar[Mapping[str, Any]] = {}


def function_at(path: str) -> Callable[..., Any]:
    """Import and return the function of a registry row, given as `module:function`."""
    module, name = path.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


class Section:
    """Base of the dataclasses of settings; validates type, choices and bounds of every setting."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            if item.metadata:
                check_setting(item, hints[item.name], getattr(self, item.name))


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the choices of a setting of this type; empty for other settings."""
    kind = kind_of(hint)
    if isinstance(kind, type) and issubclass(kind, Choice):
        return tuple(kind.rows)
    return get_args(kind) if typing.get_origin(kind) is Literal else ()


def help_of(item: dataclasses.Field[Any], hint: Any) -> str:
    """Return the help of a setting, with that of each choice from a registry."""
    kind, text = kind_of(hint), str(item.metadata["help"])
    if isinstance(kind, type) and issubclass(kind, Choice):
        return f"{text}: " + "; ".join(row.help for row in kind.rows.values())
    return text


def kind_of(hint: Any) -> Any:
    """Return the type of a setting without None."""
    return next(kind for kind in _kinds(hint) if kind is not types.NoneType)


def is_optional(hint: Any) -> bool:
    """Whether a setting of this type may be None."""
    return types.NoneType in _kinds(hint)


def read_value(name: str, hint: Any, text: str) -> Any:
    """Parse the value of a setting of type `hint` from `text`; choices are case-insensitive.

    Does not check bounds and choices.

    Raises:
        SettingError: `text` is not a number, or neither true nor false.
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
    """Return the types of a union, also of a `typing.Union` such as `Literal[...] | None`, or the type itself."""
    return get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def check_setting(item: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    """Raise SettingError for a value of the wrong type, outside the choices or out of range."""
    if value is None and is_optional(hint):
        return
    kind = kind_of(hint)
    if typing.get_origin(kind) is tuple:
        _check_items(item, get_args(kind)[0], value)
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


def _check_items(item: dataclasses.Field[Any], kind: Any, values: Any) -> None:
    if not isinstance(values, tuple):
        raise SettingError(item.name, values, "must be a tuple of values")
    for value in values:
        check_setting(item, kind, value)
        if values.count(value) > 1 and not item.metadata.get("may_repeat"):
            raise ConfigError(f"{item.name} has {value!r} twice; give each value once")


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
