"""Uploaded files one at a time: plain files, and members of a zip read as streams.

File names are only displayed and used for captions; no path is made from them.
"""

from __future__ import annotations

import lzma
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.data.images import CAPTION_SUFFIXES, FORMATS, Header, ImageError, load_image, read_header

from ..errors import is_disk_full
from .decoding import DECODING

MIB = 2**20
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)
_RATIO_COUNTS_FROM = 8 * MIB  # smaller files may be as flat as they like
_MAX_NAME_LENGTH = 120


class RejectedError(ConfigError):
    """A file that is not taken; the message is the reason alone."""


@dataclass(frozen=True)
class Limits:
    """Limits of one session's uploads; sizes in bytes."""

    images: int = 500
    zip_members: int = 2000
    file_bytes: int = 64 * MIB
    total_bytes: int = 1024 * MIB
    pixels: int = 25_000_000
    jpeg_pixels: int = 100_000_000  # a large one is decoded at half its size
    zip_ratio: int = 100
    caption_bytes: int = 16 * 1024


@dataclass(frozen=True)
class Incoming:
    """One file.

    Attributes:
        name: its name, as text.
        place: the key that an image and its caption share.
        open: opens its contents.
    """

    name: str
    place: tuple[str, str]
    open: Callable[[], BinaryIO]
    packed_bytes: int | None = None  # size in the zip

    @property
    def is_caption(self) -> bool:
        return self.name.lower().endswith(CAPTION_SUFFIXES)


@dataclass(frozen=True)
class Rejection:
    """A rejected file and the reason."""

    name: str
    reason: str


def unpack(name: str, path: Path, limits: Limits, stack: ExitStack) -> Iterator[Incoming | Rejection]:
    """The file, or the members of a zip; `stack` keeps the zip open while they are read."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) in _ZIP_STARTS
    except OSError as error:
        yield Rejection(shown_name(name), f"it cannot be read: {error.strerror}")
        return
    if not is_zip:

        def read() -> BinaryIO:
            return open(path, "rb")

        yield Incoming(shown_name(name), ("", _stem(name)), read)
        return
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except _ZIP_ERRORS:
        yield Rejection(shown_name(name), "a damaged zip")
        return
    members = archive.infolist()
    if len(members) > limits.zip_members:
        reason = f"a zip of {len(members)} files; at most {limits.zip_members} are unpacked"
        yield Rejection(shown_name(name), reason)
        return
    yield from _members(name, archive, members)


def copy_limited(incoming: Incoming, target: Path, limits: Limits, room: int) -> int:
    """Write the file to `target` and return its size.

    Raises RejectedError for an empty file and as soon as a limit is exceeded; OSError on a full disk.
    """
    written = 0
    try:
        with incoming.open() as source, open(target, "wb") as sink:
            while chunk := source.read(MIB):
                written += len(chunk)
                _check_size(written, incoming.packed_bytes, limits, room)
                sink.write(chunk)
    except RejectedError:
        raise
    except (*_ZIP_ERRORS, NotImplementedError) as error:
        if is_disk_full(error):
            raise
        raise RejectedError(f"it cannot be unpacked: {error}") from error
    if not written:
        raise RejectedError("the file is empty")
    return written


def image_suffix(path: Path, limits: Limits) -> str:
    """The suffix of the image's actual format; it is decoded completely after its size is checked.

    Raises RejectedError for files that are no images, damaged or too large.
    """
    if _looks_like_svg(path):
        raise RejectedError("an SVG is a drawing without pixels; export it as PNG")
    try:
        with DECODING:
            header = read_header(path)
            _check_pixels(header, limits)
            load_image(path)
    except ImageError as error:
        raise RejectedError(error.reason) from error
    return FORMATS[header.kind]


def shown_name(name: str) -> str:
    """`name` without folders and control characters, to be shown."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return plain_text(last)[:_MAX_NAME_LENGTH] or "a file without a name"


def plain_text(text: str) -> str:
    """`text` on one line in NFC, without control, format and private characters."""
    kept = (" " if char.isspace() else char for char in unicodedata.normalize("NFC", text))
    return " ".join("".join(c for c in kept if c == " " or unicodedata.category(c)[0] != "C").split())


def _members(name: str, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> Iterator[Incoming | Rejection]:
    for info in members:
        path = info.orig_filename.replace("\\", "/")
        if info.is_dir() or any(part.startswith((".", "__MACOSX")) and part != ".." for part in path.split("/")):
            continue
        reason = _member_fault(info, path)
        if reason is not None:
            yield Rejection(plain_text(path)[:_MAX_NAME_LENGTH], reason)
            continue

        def read(info: zipfile.ZipInfo = info) -> BinaryIO:
            return cast(BinaryIO, archive.open(info))

        yield Incoming(shown_name(path), (name, _stem(path)), read, info.compress_size)


def _member_fault(info: zipfile.ZipInfo, path: str) -> str | None:
    if path.startswith("/") or ".." in path.split("/") or path[1:2] == ":":
        return "its path leads out of the zip"
    mode = info.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "a link or device, not a file"
    if info.flag_bits & 1:
        return "it is encrypted; make a zip without a password"
    return None


def _check_size(written: int, packed_bytes: int | None, limits: Limits, room: int) -> None:
    if written > limits.file_bytes:
        raise RejectedError(f"larger than {limits.file_bytes // MIB} MiB")
    if written > room:
        raise RejectedError(f"all uploads together are larger than {limits.total_bytes // MIB} MiB")
    if packed_bytes is not None and written > max(_RATIO_COUNTS_FROM, limits.zip_ratio * packed_bytes):
        raise RejectedError(f"compressed more than {limits.zip_ratio}-fold, as a zip bomb is; upload it unzipped")


def _check_pixels(header: Header, limits: Limits) -> None:
    is_jpeg = header.kind == "JPEG"
    most = limits.jpeg_pixels if is_jpeg else limits.pixels
    if header.width * header.height > most:
        other = "" if is_jpeg else f", or save it as JPEG, which may have {limits.jpeg_pixels // 1_000_000} million"
        raise RejectedError(f"more than {most // 1_000_000} million pixels; make it smaller{other}")


def _looks_like_svg(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith(b"<") and b"<svg" in head.lower()


def _stem(path: str) -> str:
    """`path` without its suffix, which an image and its caption share."""
    head, dot, tail = path.rpartition(".")
    return head if dot and "/" not in tail else path
