"""Saves uploaded files as images of a session's folder, with captions and the user's file names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flatlora_diffusion.storage.atomic_io import write_text

from ..errors import describe_error
from .captioned_folder import images_of, read_texts, write_caption
from .unpack import Incoming, Limits, RejectedError, Rejection, copy_limited, image_suffix, plain_text

MAX_CAPTION_LENGTH = 2000
NAMES = "names.json"
# What cameras, phones and browsers call their files: no caption.
_NO_WORDS = re.compile(r"(img|dsc[nf]?|pxl|mvi|images?|photo|pic|picture|screenshot|scan|download|unnamed|untitled)?")


@dataclass(frozen=True)
class Upload:
    """One saved image. `original` is the user's file name, as text."""

    path: Path
    original: str
    caption: str


@dataclass
class UploadResult:
    """The saved images, and the rejected files with reasons."""

    saved: list[Upload] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


class UploadSaver:
    """One upload into one folder, which the caller has locked."""

    def __init__(self, folder: Path, limits: Limits, result: UploadResult) -> None:
        self._folder, self._limits, self._result = folder, limits, result
        self._aside = folder / "incoming.part"
        present = images_of(folder)
        self._count = len(present)
        self._next = 1 + max((int(path.stem) for path in present), default=0)
        self._room = limits.total_bytes - sum(path.stat().st_size for path in folder.iterdir())

    def run(self, incoming: Sequence[Incoming]) -> None:
        captions: dict[tuple[str, str], str] = {}
        places = {item.place for item in incoming if not item.is_caption}
        try:
            for item in (item for item in incoming if item.is_caption):
                self._try(item, lambda item: captions.update({item.place: self._text(item, places)}))
            for item in (item for item in incoming if not item.is_caption):
                self._try(item, lambda item: self._take(item, captions.get(item.place)))
        finally:
            self._aside.unlink(missing_ok=True)
            if self._result.saved:
                self._keep_names({upload.path.name: upload.original for upload in self._result.saved})

    def _keep_names(self, new: dict[str, str]) -> None:
        file = self._folder / NAMES
        try:
            write_text(file, json.dumps(read_texts(file) | new))
        except OSError as error:  # the images are there, and have their numbers for names
            self._result.rejected.append(Rejection("the names of the images", describe_error(error)))

    def _try(self, item: Incoming, take: Callable[[Incoming], None]) -> None:
        try:
            take(item)
        except RejectedError as error:
            self._result.rejected.append(Rejection(item.name, str(error)))
        except OSError as error:  # a full disk; there may be room for the next, or at least for those that are taken
            self._result.rejected.append(Rejection(item.name, describe_error(error)))

    def _text(self, item: Incoming, places: set[tuple[str, str]]) -> str:
        size = self._copy(item)
        if size > self._limits.caption_bytes:
            raise RejectedError(f"a caption of more than {self._limits.caption_bytes // 1024} KiB")
        try:
            text = plain_text(self._aside.read_text(encoding="utf-8-sig"))[:MAX_CAPTION_LENGTH]
        except UnicodeDecodeError as error:
            raise RejectedError("a caption that is not UTF-8 text; save it as UTF-8") from error
        if item.place not in places:
            raise RejectedError("not used, as no image of the same name came with it")
        return text

    def _take(self, item: Incoming, caption: str | None) -> None:
        if self._count >= self._limits.images:
            raise RejectedError(f"there are {self._count} images already; {self._limits.images} is the most")
        self._copy(item)
        path = self._folder / f"{self._next:04}{image_suffix(self._aside, self._limits)}"
        text = caption or words_in_name(item.name)
        try:
            write_caption(path, text)
            os.replace(self._aside, path)
        except OSError:
            write_caption(path, "")
            raise
        self._count, self._next = self._count + 1, self._next + 1
        self._result.saved.append(Upload(path, item.name, text))

    def _copy(self, item: Incoming) -> int:
        """The bytes count even if they are refused after, so that no upload can keep the machine unpacking."""
        try:
            size = copy_limited(item, self._aside, self._limits, self._room)
        except RejectedError:
            self._room -= self._aside.stat().st_size if self._aside.exists() else 0
            raise
        self._room -= size
        return size


def words_in_name(name: str) -> str:
    """`alarm clock` for `alarm_clock-.png`, nothing for `IMG_2041.jpg`."""
    stem = name.rpartition(".")[0] or name
    words = re.sub(r"[\W_]+", " ", stem).split()
    plain = [letters for word in words if (letters := word.rstrip("0123456789"))]
    return "" if _NO_WORDS.fullmatch(" ".join(plain).lower()) else " ".join(words)
