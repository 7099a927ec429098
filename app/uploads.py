"""Uploaded images, each session's in a private folder: `SESSION/0001.png` with its caption in `SESSION/0001.txt`.

The user's own names for them are in `SESSION/names.json`, so that they outlive the page.
The trainer gets a copy that no later edit changes: `frozen/HASH/`, the same for the same images and captions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from app.intake import Incoming, Limits, Refusal, RefusedError, copy_limited, image_suffix, plain_text, unpack
from flatlora_diffusion.config import ConfigError

MOST_CAPTION_LETTERS = 2000
_NAMES = "names.json"
# What cameras, phones and browsers call their files: no caption.
_NO_WORDS = re.compile(r"(img|dsc[nf]?|pxl|mvi|images?|photo|pic|picture|screenshot|scan|download|unnamed|untitled)?")
_SESSION = re.compile(r"[A-Za-z0-9_-]{16,64}")
_IMAGE = re.compile(r"\d{4,}\.(?!txt$|part$)[a-z0-9]+")


@dataclass(frozen=True)
class Upload:
    """One image that was taken. `original` is the user's own name for it, as text."""

    path: Path
    original: str
    caption: str


@dataclass
class UploadResult:
    """What was taken, and what was not and why."""

    taken: list[Upload] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


class Uploads:
    """The uploads of all sessions below `folder`. Safe under several threads and processes."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder = folder
        self.frozen = folder / "frozen"
        self.limits = limits or Limits()

    def new_session(self) -> str:
        """A key that nobody can guess. Who has it sees the session's images, so the browser keeps it."""
        return secrets.token_urlsafe(24)

    def session_folder(self, session: str) -> Path:
        """The session's folder, made if need be. Raises ConfigError for a key that is none."""
        if not _SESSION.fullmatch(session):
            raise ConfigError("this upload session is not known; reload the page")
        folder = self.folder / "sessions" / session
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def add(self, session: str, files: Sequence[tuple[str, Path]]) -> UploadResult:
        """Take images, captions and zips of both, given as (the user's name, where the bytes are).

        A caption is the text of the `.txt` or `.caption` of the same name, or else the words of the image's name;
        a name that a camera gave has none.
        """
        result = UploadResult()
        with self._locked(session) as folder, ExitStack() as stack:
            incoming = []
            for name, path in files:
                for item in unpack(name, path, self.limits, stack):
                    if isinstance(item, Refusal):
                        result.refused.append(item)
                    else:
                        incoming.append(item)
            _Intake(folder, self.limits, result).run(incoming)
        return result

    def images(self, session: str) -> list[Path]:
        """The session's images in the order they came."""
        return _images(self.session_folder(session))

    def captions(self, session: str) -> dict[str, str]:
        """Caption by image name (`0001.png`); empty for an image without one."""
        return {path.name: _caption(path) for path in self.images(session)}

    def names(self, session: str) -> dict[str, str]:
        """The user's own file name by image name, in the order the images came."""
        folder = self.session_folder(session)
        names = _names(folder)
        return {path.name: names.get(path.name, path.name) for path in _images(folder)}

    def save_captions(self, session: str, captions: Mapping[str, str]) -> None:
        """Write the captions beside their images; an empty one is removed.

        Raises ConfigError for an image that is not the session's, or a caption that is too long.
        """
        with self._locked(session) as folder:
            known = {path.name: path for path in _images(folder)}
            texts = {name: plain_text(text) for name, text in captions.items()}
            for name, text in texts.items():
                if name not in known:
                    raise ConfigError("the caption is of an image that is not among yours; reload the page")
                if len(text) > MOST_CAPTION_LETTERS:
                    raise ConfigError(f"the caption of {name} has {len(text)} letters; {MOST_CAPTION_LETTERS} at most")
            for name, text in texts.items():
                _write_caption(known[name], text)

    def remove(self, session: str, name: str) -> None:
        """Delete one image and its caption. Raises ConfigError when it is not the session's."""
        with self._locked(session) as folder:
            path = next((path for path in _images(folder) if path.name == name), None)
            if path is None:
                raise ConfigError("that image is not among yours; reload the page")
            _write_caption(path, "")
            path.unlink()
            names = _names(folder)
            names.pop(name, None)
            _write_whole(folder / _NAMES, json.dumps(names))

    def clear(self, session: str) -> None:
        """Delete all images of the session."""
        with self._locked(session) as folder:
            for path in folder.iterdir():
                path.unlink()

    def freeze(self, session: str) -> Path:
        """A folder with the images and captions as they are now, to train on. Raises ConfigError without images."""
        with self._locked(session) as folder:
            images = _images(folder)
            if not images:
                raise ConfigError("there are no images to train on; upload some first")
            files = [*images, *sorted(folder.glob("*.txt"))]
            content = hashlib.sha256()
            for path in files:
                content.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
            frozen = self.frozen / content.hexdigest()[:16]
            if not frozen.exists():
                aside = frozen.with_name(f"{frozen.name}.{secrets.token_hex(4)}.part")
                aside.mkdir(parents=True)
                for path in files:
                    shutil.copyfile(path, aside / path.name)
                _rename_new(aside, frozen)
        return frozen

    @contextmanager
    def _locked(self, session: str) -> Iterator[Path]:
        folder = self.session_folder(session)
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        with FileLock(locks / session):
            yield folder


class _Intake:
    """One upload into one folder, which is locked meanwhile."""

    def __init__(self, folder: Path, limits: Limits, result: UploadResult) -> None:
        self._folder, self._limits, self._result = folder, limits, result
        self._aside = folder / "incoming.part"
        present = _images(folder)
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
            names = _names(self._folder) | {upload.path.name: upload.original for upload in self._result.taken}
            if names:
                _write_whole(self._folder / _NAMES, json.dumps(names))

    def _try(self, item: Incoming, take: Callable[[Incoming], None]) -> None:
        try:
            take(item)
        except RefusedError as error:
            self._result.refused.append(Refusal(item.name, str(error)))

    def _text(self, item: Incoming, places: set[tuple[str, str]]) -> str:
        size = self._copy(item)
        if size > self._limits.caption_bytes:
            raise RefusedError(f"a caption of more than {self._limits.caption_bytes // 1024} KiB")
        try:
            text = plain_text(self._aside.read_text(encoding="utf-8-sig"))[:MOST_CAPTION_LETTERS]
        except UnicodeDecodeError as error:
            raise RefusedError("a caption that is not UTF-8 text; save it as UTF-8") from error
        if item.place not in places:
            raise RefusedError("not used, as no image of the same name came with it")
        return text

    def _take(self, item: Incoming, caption: str | None) -> None:
        if self._count >= self._limits.images:
            raise RefusedError(f"there are {self._count} images already; {self._limits.images} is the most")
        self._copy(item)
        path = self._folder / f"{self._next:04}{image_suffix(self._aside, self._limits)}"
        text = caption or words_of(item.name)
        os.replace(self._aside, path)
        _write_caption(path, text)
        self._count, self._next = self._count + 1, self._next + 1
        self._result.taken.append(Upload(path, item.name, text))

    def _copy(self, item: Incoming) -> int:
        """The bytes count even if they are refused after, so that no upload can keep the machine unpacking."""
        try:
            size = copy_limited(item, self._aside, self._limits, self._room)
        except RefusedError:
            self._room -= self._aside.stat().st_size if self._aside.exists() else 0
            raise
        self._room -= size
        return size


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _IMAGE.fullmatch(path.name))


def _names(folder: Path) -> dict[str, str]:
    path = folder / _NAMES
    names: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return names


def _caption(image: Path) -> str:
    path = image.with_suffix(".txt")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _write_caption(image: Path, text: str) -> None:
    path = image.with_suffix(".txt")
    if not text:
        path.unlink(missing_ok=True)
        return
    _write_whole(path, text)


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def words_of(name: str) -> str:
    """`alarm clock` for `alarm_clock-.png`, nothing for `IMG_2041.jpg`."""
    stem = name.rpartition(".")[0] or name
    words = re.sub(r"[\W_]+", " ", stem).split()
    told = [letters for word in words if (letters := word.rstrip("0123456789"))]
    return "" if _NO_WORDS.fullmatch(" ".join(told).lower()) else " ".join(words)


def _rename_new(aside: Path, final: Path) -> None:
    """Rename the folder unless another session has made the same meanwhile."""
    try:
        os.rename(aside, final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(aside)
