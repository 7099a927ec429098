"""What a setting is: default, help and bounds in one place, and the errors that tell what is wrong with a value."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """What comes with the program: inside of the package where it is installed, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parent / name


SAMPLES = shipped("samples")


class ConfigError(ValueError):
    """Something the user can put right: the message says what, and what is allowed."""

    exit_code = 2


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


class Section:
    """Checks the type, the choices and the bounds of every setting of a dataclass when it is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            if item.metadata:
                _check(item, hints[item.name], getattr(self, item.name))


def choices_of(hint: Any) -> tuple[str, ...]:
    """The words that a setting of this type may be; empty for a setting that is no choice."""
    kinds = _kinds(hint)
    return next((get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal), ())


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union (`X | None`, also in its older form that `Literal[...] | None` has), or the one type."""
    return get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _check(item: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    kinds = _kinds(hint)
    if value is None and types.NoneType in kinds:
        return
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        _check_each(item, get_args(kind)[0], value)
        return
    if typing.get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{item.name}={value!r} is not one of {', '.join(get_args(kind))}")
        return
    if not _is_a(value, kind):
        raise ConfigError(f"{item.name}={value!r} must be of type {kind.__name__}")
    low, high = item.metadata["min"], item.metadata["max"]
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{item.name}={value} must be a finite number")
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{item.name}={value} is out of range: it must be {allowed}")


def _check_each(item: dataclasses.Field[Any], kind: Any, values: Any) -> None:
    if not isinstance(values, tuple):
        raise ConfigError(f"{item.name}={values!r} must be a tuple of values")
    for value in values:
        _check(item, kind, value)
        if values.count(value) > 1 and not item.metadata.get("repeats"):
            raise ConfigError(f"{item.name} has {value!r} twice; give each value once")


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
