"""Untrusted .safetensors files: the header is checked before anything is believed, tensors are read one by one.

Nothing is unpickled or executed, and memory is bounded by the header's limit and one tensor, whatever a file claims.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flatlora_diffusion.config import ConfigError

MOST_HEADER = 8 * 2**20  # bytes; a LoRA of every layer of SDXL needs less than half a MiB
MOST_FILE = 8 * 2**30  # bytes; a LoRA of rank 512 on every linear layer in fp32 is smaller
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# First bytes of what is often renamed; a safetensors file has a small number there, then a brace.
_PAGE = "an HTML page, as sites send it instead of a file; download the file itself"
_OTHER_KINDS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it, with another ending"),
    (b"GGUF", "a GGUF file, with another ending"),
    (b"version https://git-lfs", "a git-LFS pointer, which only stands for the file; fetch it with `git lfs pull`"),
    (b"<!doctype html", _PAGE),
    (b"<html", _PAGE),
    (b"{", "a JSON text"),
)
_LONGEST_START = 64  # bytes behind the length in which a text is recognized
_MOST_NAMED = 100  # characters of a name in a message


class Entry(NamedTuple):
    """A tensor as the header describes it; `start` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class CheckedFile:
    """A safetensors file whose header is sound: every tensor lies in the file and none overlaps another."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def tensor(self, name: str) -> Tensor:
        """The tensor in its own dtype, on the CPU. Raises ConfigError when it has a NaN or an infinity."""
        entry = self.entries[name]
        dtype = _DTYPES[entry.dtype]
        try:
            with open(self.path, "rb") as handle:
                handle.seek(entry.start)
                content = bytearray(handle.read(entry.length))
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(content) < entry.length:
            raise ConfigError(f"{self.path} changed while it was read")
        if not content:
            return torch.empty(entry.shape, dtype=dtype)
        tensor = torch.frombuffer(content, dtype=dtype).reshape(entry.shape)
        if dtype.is_floating_point and not bool(tensor.float().isfinite().all()):
            raise ConfigError(f"{self.path}: {shown(name)} has a NaN or an infinity; the file is damaged")
        return tensor


def checked_file(path: Path) -> CheckedFile:
    """The file behind `path` with its header read and checked, no tensor yet.

    Raises ConfigError, one sentence, for anything that is not a sound safetensors file.
    """
    size, raw = _header_bytes(path)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        _refuse(path, "its header is nested too deeply")
    except ValueError as error:
        _refuse(path, f"its header is not JSON: {shown(str(error))}")
    if not isinstance(header, dict):
        _refuse(path, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its metadata are not all text")
    if not header:
        _refuse(path, "it holds no tensor")
    begin = 8 + len(raw)
    entries = {name: _entry(path, name, value, begin) for name, value in header.items()}
    _check_places(path, entries, begin, size)
    return CheckedFile(path, metadata, entries)


def shown(text: str) -> str:
    """Text from a file as it may be printed: shortened, control characters replaced."""
    short = text if len(text) <= _MOST_NAMED else text[:_MOST_NAMED] + "..."
    return "".join(sign if sign.isprintable() else "?" for sign in short)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names of many, as they may be printed."""
    every = list(names)
    return ", ".join(shown(name) for name in every[:most]) + (", ..." if len(every) > most else "")


def _header_bytes(path: Path) -> tuple[int, bytes]:
    """The file's size and its header, which is read only when its length is credible."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a .safetensors file")
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a .safetensors file")
    if not path.is_file():
        raise ConfigError(f"{path} is no regular file; give a .safetensors file")
    try:
        with open(path, "rb") as handle:
            size = path.stat().st_size
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            _check_start(path, start + handle.read(_LONGEST_START), length, size)
            handle.seek(8)
            return size, handle.read(length)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _check_start(path: Path, start: bytes, length: int, size: int) -> None:
    if size == 0:
        _refuse(path, "it is empty")
    other = _other_kind(start, length)
    if other is not None:
        _refuse(path, f"it is {other}")
    if length > max(MOST_HEADER, size):
        _refuse(path, "it does not begin as one, so it is another kind of file or damaged")
    if len(start) < 8 or length > size - 8:
        _refuse(path, f"it is cut short: it has {size} bytes, fewer than its header says")
    if length > MOST_HEADER:
        _refuse(path, f"its header has {length} bytes, more than the {MOST_HEADER} that any LoRA needs")
    if size > MOST_FILE:
        _refuse(path, f"it has {size} bytes, more than any LoRA of SDXL")


def _other_kind(start: bytes, length: int) -> str | None:
    """The kind of a file with this start, where it is a known one."""
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, which can hold code, with another ending"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kinds = (name for first, name in _OTHER_KINDS if start.startswith(first) or text.startswith(first))
    return next(kinds, None) if length > MOST_HEADER else None  # else these bytes may be a header's length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is there twice")
    return values


def _entry(path: Path, name: str, value: Any, begin: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"its header does not describe {shown(name)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _refuse(path, f"{shown(name)} has the unknown dtype {shown(str(dtype))}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        _refuse(path, f"{shown(name)} has no proper shape and place")
    first, last = offsets
    if last - first != math.prod(shape) * _DTYPES[dtype].itemsize:
        _refuse(path, f"{shown(name)} has not as many bytes as its shape {shown(str(shape))} and dtype need")
    return Entry(dtype, tuple(shape), begin + first, last - first)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_places(path: Path, entries: dict[str, Entry], begin: int, size: int) -> None:
    """One tensor behind the other without gap, to the end of the file."""
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)):
        if entry.start + entry.length > size:
            _refuse(path, f"{shown(name)} lies outside the file; it is cut short")
        if entry.start != end:
            what = "overlaps another tensor" if entry.start < end else "has bytes before it that belong to no tensor"
            _refuse(path, f"{shown(name)} {what}")
        end += entry.length
    if end != size:
        _refuse(path, f"its last {size - end} bytes belong to no tensor")


def _refuse(path: Path, why: str) -> NoReturn:
    raise ConfigError(f"{path} is no sound .safetensors file: {why}")
