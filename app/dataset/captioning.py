"""The Dataset tab's handlers for captions: by file names, models or an edit to all at once, and the trigger word."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from flatlora_diffusion.config import CAPTION_WRITERS, ConfigError
from flatlora_diffusion.evaluation.tagger import MODEL_FILE, TAGS_FILE

from ..context import AppContext
from ..process.json_file import read_json
from ..uploads.captions import captions_from_names, has_trigger, with_trigger
from ..widgets.messages import note, show_errors
from .view import fill_captions

REPLACE, FRONT, END, REMOVE = "Search and replace", "Put in front", "Put at the end", "Remove a word"
CHANGES = (REPLACE, FRONT, END, REMOVE)


def installed_captioners(folders: Sequence[Path]) -> list[str]:
    """Captioning models in the Hugging Face cache, smallest first, then those in `folders`."""
    there = [place for folder in folders for place in (folder, *sorted(folder.glob("*/")))]
    return [*_cached(), *(place.as_posix() for place in there if _is_captioner(place))]


def _cached() -> list[str]:
    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):  # ValueError: a file where the folder should be
        return []
    found = [repo for repo in repos if any(_is_captioner(one.snapshot_path) for one in repo.revisions)]
    return [repo.repo_id for repo in sorted(found, key=lambda repo: repo.size_on_disk)]


def _is_captioner(folder: Path) -> bool:
    if (folder / TAGS_FILE).is_file():
        return (folder / MODEL_FILE).is_file()
    architectures = read_json(folder / "config.json").get("architectures")
    is_writer = isinstance(architectures, list) and any(kind in architectures for kind in CAPTION_WRITERS.values())
    return is_writer and any(folder.glob("*.safetensors"))


def count_captions(context: AppContext, session: str) -> str:
    """How many images have a caption."""
    captions = context.uploads.captions(session) if session else {}
    return note(f"<b>{len(captions)} images, captions {sum(map(bool, captions.values()))}/{len(captions)}</b>, saved")


def undo_captions(context: AppContext, session: str) -> str:
    """Bring back the captions from before the last change; says so."""
    with show_errors():
        if not session:
            raise ConfigError("there are no captions to bring back; drop some images first")
        count = context.uploads.undo_captions(session)
    images = "1 caption is" if count == 1 else f"{count} captions are"
    return note(f"{images} as before the last change; press the same button again to take that back")


def caption_all(context: AppContext, session: str, trigger: str) -> str:
    """Write captions from file names and the trigger word, except over hand-written captions; report how many."""
    with show_errors():
        if not trigger.strip():
            raise ConfigError("the trigger word is empty; enter a made-up word, such as TOK")
        names = context.uploads.names(session) if session else {}
        if not names:
            raise ConfigError("there are no images to caption; drop some first")
        made = captions_from_names(names, context.uploads.captions(session), trigger.strip())
        context.uploads.save_captions(session, made)
    left = len(names) - len(made)
    kept = f"; {left} left as they are: a caption of your own, or a name without words" if left else ""
    return note(f"{len(made)} captions written from file names{kept}")


def caption_by_model(
    context: AppContext, session: str, name_or_path: str | None, trigger: str, on_progress: Callable[[int, int], None]
) -> str:
    """Caption the images without a caption by a model, and report how many.

    Args:
        on_progress: called with the number of images done and in total.
    """
    with show_errors():
        present = context.uploads.captions(session) if session else {}
        if not present:
            raise ConfigError("there are no images to caption; drop some first")
        if all(present.values()):
            raise ConfigError("every image has a caption; press Empty all captions to write new ones")
        name = (name_or_path or "").strip()
        if not name:
            raise ConfigError("no captioning model is given; enter a folder or hub id, as the box says")
        context.allowed_paths.check_model("captioning model", name)
        from flatlora_diffusion.evaluation.captioner import load_captioner  # imports transformers, which takes seconds

        captioner = load_captioner(name, trigger.strip())
        count = fill_captions(context.uploads, session, captioner, on_progress)
    return note(f"{count} captions written by the model; check and correct them")


def empty_captions(context: AppContext, session: str) -> None:
    """Remove all captions; the images stay."""
    if session:
        context.uploads.save_captions(session, dict.fromkeys(context.uploads.captions(session), ""))


def use_trigger(prompt: str, trigger: str, used: str) -> tuple[str, str]:
    """(the preview prompt with the trigger word, the word in it); `used`: the word in it before."""
    new = trigger.strip() or used
    return with_trigger(prompt, used, new), new


def change_all(context: AppContext, session: str, how: str, text: str, by: str) -> str:
    """Change all captions of a session as `changed_captions` does; says how many were."""
    with show_errors():
        present = context.uploads.captions(session) if session else {}
        if not present:
            raise ConfigError("there are no images whose captions could be changed; drop some first")
        changed = changed_captions(present, how, text, by)
        context.uploads.save_captions(session, changed)
    return note(f"{len(changed)} of {len(present)} captions changed; Undo reverts this")


def changed_captions(captions: Mapping[str, str], how: str, text: str, by: str) -> dict[str, str]:
    """The captions that an edit changes, by image. A text is only added where the caption lacks it.

    Args:
        by: the replacement of `text` for REPLACE.

    Raises ConfigError without a text.
    """
    if not text.strip():
        raise ConfigError("the text is empty; write a text to search for or to insert")
    made = {
        name: _changed(caption, how, text if how == REPLACE else text.strip(), by)
        for name, caption in captions.items()
    }
    return {name: caption for name, caption in made.items() if caption != captions[name]}


def _changed(caption: str, how: str, text: str, by: str) -> str:
    if how == REPLACE:
        return caption.replace(text, by)
    if how == REMOVE:
        without = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", "", caption, flags=re.IGNORECASE)
        return _tidy(without) if without != caption else caption
    if has_trigger(caption, text):
        return caption
    parts = (text, caption) if how == FRONT else (caption, text)
    return " ".join(part for part in parts if part)


def _tidy(caption: str) -> str:
    """Remove double spaces and stray commas that a removed word leaves."""
    caption = re.sub(r"\s+", " ", caption)
    caption = re.sub(r"\s*,(\s*,)+", ",", caption)
    return re.sub(r"\s+,", ",", caption).strip(" ,")
