"""The Dataset tab's handlers for captions and the trigger word."""

from __future__ import annotations

from collections.abc import Callable

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..uploads.captions import captions_from_names, with_trigger
from ..widgets.messages import note, show_errors
from .view import fill_captions


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
