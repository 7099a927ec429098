"""Uploaded images, each session's in a private folder: `SESSION/0001.png` with its caption in `SESSION/0001.txt`.

`SESSION/names.json` has the user's file names, `SESSION/captions_before.json` the captions before the last change, and
`before/SESSION/` the images that were last removed or replaced together, for undo. The trainer gets a copy that no
later edit changes: `frozen/HASH/`, the same for the same images and captions.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.storage.atomic_io import write_text

from ..process.temporary_folders import temporary_folder
from .captioned_folder import (
    caption_of,
    content_of,
    files_of,
    images_of,
    read_texts,
    version_of,
    write_caption,
)
from .save_upload import MAX_CAPTION_LENGTH, NAMES, UploadResult, UploadSaver
from .unpack import Limits, Rejection, plain_text, unpack

_BEFORE = "captions_before.json"
_SESSION = re.compile(r"[A-Za-z0-9_-]{16,64}")


@dataclass(frozen=True)
class SavedCaption:
    """A caption as it is now; `is_saved` if it is the one that was sent."""

    version: str
    text: str
    is_saved: bool


class Uploads:
    """The uploads of all sessions below `folder`. Safe under several threads and processes."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder = folder
        self.frozen = folder / "frozen"
        self.temporary = folder / "temporary"
        self.limits = limits or Limits()

    def new_session(self) -> str:
        """A random key. It gives access to the session's images, so the browser stores it."""
        return secrets.token_urlsafe(24)

    def session_folder(self, session: str) -> Path:
        """The session's folder, created if missing. Raises ConfigError for an invalid key."""
        if not _SESSION.fullmatch(session):
            raise ConfigError("this upload session is not known; reload the page")
        folder = self.folder / "sessions" / session
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def add(self, session: str, files: Sequence[tuple[str, Path]]) -> UploadResult:
        """Save images, captions and zips, given as (the user's file name, path).

        A caption is the text of the `.txt` or `.caption` of the same name, or the words of the image's name; names
        from cameras give no caption.
        """
        result = UploadResult()
        with self._locked(session) as folder, ExitStack() as stack:
            incoming = []
            for name, path in files:
                for item in unpack(name, path, self.limits, stack):
                    if isinstance(item, Rejection):
                        result.rejected.append(item)
                    else:
                        incoming.append(item)
            UploadSaver(folder, self.limits, result).run(incoming)
        return result

    def images(self, session: str) -> list[Path]:
        """The session's images in the order they came."""
        return images_of(self.session_folder(session))

    def image(self, session: str, name: str) -> Path:
        """One image of the session. Raises ConfigError for any other."""
        return _image(self.session_folder(session), name)

    def captions(self, session: str) -> dict[str, str]:
        """Captions by image name (`0001.png`); empty for images without a caption."""
        return {path.name: caption_of(path) for path in self.images(session)}

    def names(self, session: str) -> dict[str, str]:
        """The user's own file name by image name, in the order the images came."""
        folder = self.session_folder(session)
        names = self.names_in(folder)
        return {path.name: names.get(path.name, path.name) for path in images_of(folder)}

    def names_in(self, folder: Path) -> dict[str, str]:
        """The user's own file names by image name, of a session's folder or its frozen copy; empty for another."""
        return read_texts(folder / NAMES) if folder.resolve().is_relative_to(self.folder.resolve()) else {}

    def save_captions(self, session: str, captions: Mapping[str, str], is_same_change: bool = False) -> None:
        """Write the captions; an empty one is removed.

        They are undone together, and with `is_same_change` together with those of the last call.

        Raises ConfigError for an unknown image or a caption that is too long.
        """
        with self._locked(session) as folder:
            _write_captions(folder, captions, is_same_change)

    def save_caption(
        self, session: str, name: str, version: str, text: str, is_same_change: bool = False
    ) -> SavedCaption:
        """Write a caption over the one of `version`; if that has changed, write nothing and return the current one.

        Args:
            is_same_change: undo it together with the last change, if that was to this caption alone.

        Raises ConfigError as `save_captions` does.
        """
        with self._locked(session) as folder:
            image = folder / name
            is_known = image in images_of(folder)
            is_saved = not is_known or version_of(image) == version
            if is_saved:
                is_same_change &= list(read_texts(folder / _BEFORE)) == [name]
                _write_captions(folder, {name: text}, is_same_change)
            return SavedCaption(version_of(image), caption_of(image), is_saved)

    def undo_captions(self, session: str) -> int:
        """Restore the captions before the last change, and return how many. A second undo reverts the first.

        Raises ConfigError without a change, or if all of its images were removed.
        """
        with self._locked(session) as folder:
            images = {path.name: path for path in images_of(folder)}
            before = {name: text for name, text in read_texts(folder / _BEFORE).items() if name in images}
            if not before:
                raise ConfigError("no caption was changed yet, so there is nothing to undo")
            now = {name: caption_of(images[name]) for name in before}
            write_text(folder / _BEFORE, json.dumps(now))
            for name, text in before.items():
                write_caption(images[name], text)
            return sum(now[name] != text for name, text in before.items())

    def remove(self, session: str, name: str) -> None:
        """Delete one image and its caption. Raises ConfigError for an unknown image."""
        with self._locked(session) as folder:
            path = _image(folder, name)
            write_caption(path, "")
            path.unlink()
            for file in (folder / NAMES, folder / _BEFORE):  # a later image may get the same number
                texts = read_texts(file)
                if texts.pop(name, None) is not None:
                    write_text(file, json.dumps(texts))

    def clear(self, session: str) -> None:
        """Remove all images of the session; `restore_removed` undoes it."""
        with self._locked(session) as folder:
            self._set_aside(folder)

    def replace(self, session: str, frozen: Path) -> int:
        """Replace the session's images by a frozen copy, and return the number of replaced images.

        `restore_removed` undoes it. Nothing is done if the contents are equal.
        """
        with self._locked(session) as folder:
            count = len(images_of(folder))
            if content_of(folder) == frozen.name:
                return 0
            with _beside(self._before(folder)) as aside:
                _copy(frozen.iterdir(), aside)
                self._set_aside(folder)
                folder.rmdir()
                os.rename(aside, folder)
            return count

    def can_restore(self, session: str) -> bool:
        """Whether images were removed or replaced together."""
        return self._before(self.session_folder(session)).is_dir()

    def restore_removed(self, session: str) -> None:
        """Swap the session's images with those that were last removed or replaced.

        Raises ConfigError if there are none.
        """
        with self._locked(session) as folder:
            before = self._before(folder)
            if not before.is_dir():
                raise ConfigError("no images were removed, so there are none to bring back")
            aside = before.with_name(f"{before.name}.part")
            os.rename(before, aside)
            os.rename(folder, before)
            os.rename(aside, folder)
            if not images_of(before):
                shutil.rmtree(before)

    def freeze(self, session: str) -> Path:
        """A folder with the images and captions as they are now, to train on. Raises ConfigError without images."""
        with self._locked(session) as folder:
            if not images_of(folder):
                raise ConfigError("there are no images to train on; upload some first")
            frozen = self.frozen / content_of(folder)
            if not frozen.exists():
                self.frozen.mkdir(parents=True, exist_ok=True)
                names = folder / NAMES
                with temporary_folder(self.temporary) as place:
                    aside = place / frozen.name
                    aside.mkdir()
                    _copy([*files_of(folder), *([names] if names.exists() else [])], aside)
                    _rename_new(aside, frozen)
        return frozen

    def frozen_copy(self, folder: str | None) -> Path | None:
        """The frozen copy that a training's image folder is, also when the app ran in another place then."""
        place = Path(folder or "")
        frozen = self.frozen / place.name
        return frozen if place.parent.name == "frozen" and place.name and frozen.is_dir() else None

    def _before(self, folder: Path) -> Path:
        return self.folder / "before" / folder.name

    def _set_aside(self, folder: Path) -> None:
        """Empty the folder; images in it can be restored."""
        if not images_of(folder):
            for path in folder.iterdir():
                path.unlink()
            return
        before = self._before(folder)
        shutil.rmtree(before, ignore_errors=True)
        before.parent.mkdir(exist_ok=True)
        os.rename(folder, before)
        folder.mkdir()

    @contextmanager
    def _locked(self, session: str) -> Iterator[Path]:
        folder = self.session_folder(session)
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        with FileLock(locks / session):
            yield folder


def _image(folder: Path, name: str) -> Path:
    path = next((path for path in images_of(folder) if path.name == name), None)
    if path is None:
        raise ConfigError("that image is not among yours; reload the page")
    return path


def _write_captions(folder: Path, captions: Mapping[str, str], is_same_change: bool) -> None:
    known = {path.name: path for path in images_of(folder)}
    texts = {name: plain_text(text) for name, text in captions.items()}
    for name, text in texts.items():
        if name not in known:
            raise ConfigError("the caption is of an image that is not among yours; reload the page")
        if len(text) > MAX_CAPTION_LENGTH:
            raise ConfigError(f"the caption of {name} has {len(text)} letters; {MAX_CAPTION_LENGTH} at most")
    before = {name: caption_of(known[name]) for name in texts}
    if is_same_change:
        before |= read_texts(folder / _BEFORE)
    if before != texts:
        write_text(folder / _BEFORE, json.dumps(before))
    for name, text in texts.items():
        write_caption(known[name], text)


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A new folder beside `place` to fill and rename; removed on an error."""
    aside = place.with_name(f"{place.name}.{secrets.token_hex(4)}.part")
    aside.mkdir(parents=True)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _rename_new(aside: Path, final: Path) -> None:
    """Rename the folder, unless another session has created the same one."""
    try:
        os.rename(aside, final)
    except OSError:
        if not final.exists():
            raise


def _copy(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        shutil.copyfile(path, folder / path.name)
