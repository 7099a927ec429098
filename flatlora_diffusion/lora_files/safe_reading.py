"""Reads untrusted .safetensors files: validates the whole header first, then reads tensors one by one.

Nothing is unpickled or executed. Memory is bounded by the header limit and one tensor, whatever the file claims.
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

MAX_HEADER_BYTES = 8 * 2**20  # bytes; a LoRA of every layer of SDXL needs less than half a MiB
MAX_FILE_BYTES = 8 * 2**30  # bytes; a LoRA of rank 512 on every linear layer in fp32 is smaller
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
# First bytes of other formats; a safetensors file begins with a small integer and a brace.
_PAGE = "an HTML page sent instead of the file; download the file itself"
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive as torch.save writes it, renamed"),
    (b"GGUF", "a renamed GGUF file"),
    (b"version https://git-lfs", "a git-LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"<!doctype html", _PAGE),
    (b"<html", _PAGE),
    (b"{", "a JSON text"),
)
_MAX_START = 64  # bytes after the header length that are searched for other formats
_MAX_NAME = 100  # characters of a name in a message


class Entry(NamedTuple):
    """A tensor as described by the header; `start` is its offset in the file, `length` its size, both in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class CheckedFile:
    """A safetensors file with a validated header: all tensors lie inside the file and do not overlap."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def tensor(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype, on the CPU. Raises ConfigError for a NaN or an infinity."""
        entry = self.entries[name]
        dtype = _DTYPES[entry.dtype]
        try:
            with open(self.path, "rb") as handle:
                handle.seek(entry.start)
                content = bytearray(handle.read(entry.length))
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(content) < entry.length:
            raise ConfigError(f"{self.path} changed while it was read; try again")
        if not content:
            return torch.empty(entry.shape, dtype=dtype)
        tensor = torch.frombuffer(content, dtype=dtype).reshape(entry.shape)
        if dtype.is_floating_point and not bool(tensor.float().isfinite().all()):
            raise ConfigError(f"{self.path}: {printable(name)} contains NaN or infinity; the file is damaged")
        return tensor


def read_header(path: Path) -> CheckedFile:
    """Read and validate the header of a safetensors file, without any tensor.

    Raises:
        ConfigError: The file is missing, damaged or in another format.
    """
    size, raw = _header_bytes(path)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        _refuse(path, "its header is nested too deeply")
    except ValueError as error:
        _refuse(path, f"its header is not JSON: {printable(str(error))}")
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its metadata are not strings")
    if not header:
        _refuse(path, "it contains no tensor")
    begin = 8 + len(raw)
    entries = {name: _entry(path, name, value, begin) for name, value in header.items()}
    _check_offsets(path, entries, begin, size)
    return CheckedFile(path, metadata, entries)


def printable(text: str) -> str:
    """Shorten text from an untrusted file and replace control characters."""
    short = text if len(text) <= _MAX_NAME else text[:_MAX_NAME] + "..."
    return "".join(character if character.isprintable() else "?" for character in short)


def shortlist(names: Iterable[str], most: int = 3) -> str:
    """Join the first `most` names for a message."""
    names = list(names)
    return ", ".join(printable(name) for name in names[:most]) + (", ..." if len(names) > most else "")


def _header_bytes(path: Path) -> tuple[int, bytes]:
    """Return the file's size and its header, after checking that the header's length is plausible."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a .safetensors file")
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a .safetensors file")
    if not path.is_file():
        raise ConfigError(f"{path} is not a regular file; give a .safetensors file")
    try:
        with open(path, "rb") as handle:
            size = path.stat().st_size
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            _check_start(path, start + handle.read(_MAX_START), length, size)
            handle.seek(8)
            return size, handle.read(length)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _check_start(path: Path, start: bytes, length: int, size: int) -> None:
    if size == 0:
        _refuse(path, "it is empty")
    other = _other_format(start, length)
    if other is not None:
        _refuse(path, f"it is {other}")
    if length > max(MAX_HEADER_BYTES, size):
        _refuse(path, "its first bytes are no header length, so it is another format or damaged")
    if len(start) < 8 or length > size - 8:
        _refuse(path, f"it is truncated: it has {size} bytes, fewer than its header says")
    if length > MAX_HEADER_BYTES:
        _refuse(path, f"its header has {length} bytes, above the limit of {MAX_HEADER_BYTES}")
    if size > MAX_FILE_BYTES:
        _refuse(path, f"it has {size} bytes, above the limit of {MAX_FILE_BYTES}")


def _other_format(start: bytes, length: int) -> str | None:
    """Name the format of a file with this start, if it is known."""
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a renamed Python pickle, which may contain code"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    formats = (name for first, name in _OTHER_FORMATS if start.startswith(first) or text.startswith(first))
    return next(formats, None) if length > MAX_HEADER_BYTES else None  # else these bytes may be a header length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _entry(path: Path, name: str, value: Any, begin: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"its header does not describe {printable(name)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _refuse(path, f"{printable(name)} has the unknown dtype {printable(str(dtype))}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        _refuse(path, f"{printable(name)} has an invalid shape or offsets")
    first, last = offsets
    if last - first != math.prod(shape) * _DTYPES[dtype].itemsize:
        _refuse(path, f"{printable(name)} has {last - first} bytes, which do not fit its shape and dtype")
    return Entry(dtype, tuple(shape), begin + first, last - first)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_offsets(path: Path, entries: dict[str, Entry], begin: int, size: int) -> None:
    """Check that the tensors fill the file after the header without gap or overlap."""
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)):
        if entry.start + entry.length > size:
            _refuse(path, f"{printable(name)} lies outside the file, which is truncated")
        if entry.start != end:
            problem = "overlaps another tensor" if entry.start < end else "has unused bytes before it"
            _refuse(path, f"{printable(name)} {problem}")
        end += entry.length
    if end != size:
        _refuse(path, f"its last {size - end} bytes belong to no tensor")


def _refuse(path: Path, why: str) -> NoReturn:
    raise ConfigError(f"{path} is not a valid .safetensors file: {why}")
