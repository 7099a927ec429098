"""The tab where images come in: upload, look, caption."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from flatlora_diffusion.config import SAMPLES, ConfigError, DataConfig, ModelConfig
from flatlora_diffusion.data.images import find_images

from ..context import AppContext
from ..errors import describe_error
from ..forms.forms import PLACED_WITH_THE_IMAGES, ConfigForm
from ..forms.labels import with_labels
from ..uploads.captions import TRIGGER, has_trigger
from ..uploads.save_upload import UploadResult
from ..widgets.browser_memory import remember_fields
from ..widgets.confirm import confirm_before
from ..widgets.html import read_static
from ..widgets.messages import note, show_errors
from .captioning import (
    REPLACE,
    caption_all,
    caption_by_model,
    change_all,
    count_captions,
    empty_captions,
    undo_captions,
    use_trigger,
)
from .cards import cards_page
from .layout import Bulk, Intake, Pictures, build_intake, build_pictures
from .thumbnails import Thumbnails
from .view import framing, load_view

_EMPTY = (
    "<b>No images yet.</b><br>Drop 10 to 30 pictures of one style here, with captions in .txt files of the same names "
    "if you have some. To try it out, load the sample icons."
)
_LOOKED_AT = (*PLACED_WITH_THE_IMAGES, "pretrained_model_name_or_path", "resolution")


_NEW_SESSION = read_static("new_session.js")


def ensure_session(context: AppContext, session: str) -> str:
    """The browser's session, or a new one."""
    return session or context.uploads.new_session()


def show(context: AppContext, thumbnails: Thumbnails, session: str, trigger: str, *values: Any) -> tuple[Any, ...]:
    """The cards, the count, the part of the page that is for images only, the button for images that were removed."""
    back = gr.Button(visible=bool(session) and context.uploads.can_restore(session))
    if not session or not context.uploads.images(session):
        return "", note(_EMPTY), gr.Column(visible=False), back
    try:
        background, has_buckets, base, resolution = values
        base = (base or "").strip()  # None if the list was cleared
        context.allowed_paths.check_model("pretrained_model_name_or_path", base)
        model = ModelConfig(pretrained_model_name_or_path=base)
        framed = framing(model, _resolution(resolution), background, has_buckets)
        cards = load_view(context.uploads, thumbnails, session, framed)
    except ConfigError as error:  # while a colour is being typed, so in place of the count and not as an alarm
        return gr.skip(), note(html.escape(with_labels(str(error))), "fl-bad"), gr.skip(), back
    count, captioned = len(cards), sum(bool(card.caption) for card in cards)
    shape = f"about {framed.size} x {framed.size}" if has_buckets else f"{framed.size} x {framed.size}"
    message = f"<b>{count} images, captions {captioned}/{count}</b>, shown as trained on: {shape} pixels"
    word = trigger.strip()
    if word and captioned and not any(has_trigger(card.caption, word) for card in cards):
        message += (
            f"<br>No caption has the trigger word {html.escape(word)}, so prompts with it will not call the style"
        )
    return cards_page(cards, session), note(message), gr.Column(visible=True), back


def upload(context: AppContext, session: str, files: Sequence[str] | None) -> tuple[str, None, str, int]:
    """Save dropped files; (session, emptied drop zone, rejections, number saved)."""
    session = ensure_session(context, session)
    try:
        result = context.uploads.add(session, [(Path(file).name, Path(file)) for file in files or ()])
    except Exception as error:  # an event that fails would leave its files in the drop zone
        return session, None, note(html.escape(describe_error(error)), "fl-bad"), 0
    return session, None, _rejections(result), len(result.saved)


def load_samples_icons(context: AppContext, session: str) -> tuple[str, str, int]:
    """Save the sample icons unless there are other images; outputs as in `upload`."""
    session = ensure_session(context, session)
    images, _ = find_images(SAMPLES / "icons_3d")
    captions = [path.with_suffix(".txt") for path in images]
    with show_errors():
        present = len(context.uploads.images(session))
        if present:
            raise ConfigError(
                f"you have {present} images, and the samples would mix with their style; "
                "press Remove all images first if you want the samples in their place"
            )
        result = context.uploads.add(session, [(path.name, path) for path in (*images, *captions)])
    return session, _rejections(result), len(result.saved)


def prefer_upload(saved_count: int, rejected: str, folder: str, dataset: str) -> tuple[Any, Any, Any]:
    """(message, image folder, dataset): clear the folder and dataset of the Train tab after an upload."""
    if not saved_count or not (folder or dataset):
        return gr.skip(), gr.skip(), gr.skip()
    text = "They will be trained on, in place of the image folder or data set that was set on the Train tab."
    return rejected + note(f"<b>{saved_count} new images.</b> {text}"), "", ""


def remove_all(context: AppContext, session: str) -> str:
    """Remove all images; also clears the rejections of the last upload."""
    if session:
        context.uploads.clear(session)
    return ""


def restore_removed(context: AppContext, session: str) -> str:
    """Swap the images with those removed or replaced last; also clears the rejections of the last upload."""
    with show_errors():
        context.uploads.restore_removed(session)
    return ""


@dataclass(frozen=True)
class DatasetTab:
    """The parts that other tabs use: the event that redraws the images, and the events after which they differ."""

    look: dict[str, Any]
    changed: list[Any]


def build_dataset_tab(context: AppContext, form: ConfigForm, session: gr.BrowserState, load: Any) -> DatasetTab:
    """`load`: the page's load event."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            intake = build_intake(context, form)
        with gr.Column(scale=3, min_width=300):
            pictures, bulk = build_pictures(context)
    looked_at = [form.by_name[name] for name in _LOOKED_AT]
    look = {
        "fn": partial(show, context, Thumbnails(context.uploads.folder / "thumbnails")),
        "inputs": [session, intake.trigger, *looked_at],
        "outputs": [pictures.cards, pictures.count, pictures.filled, intake.restore_button],
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    tab = _Tab(context, session, intake, pictures, bulk, look)
    _connect_intake(tab, form)
    _connect_removal(tab)
    _connect_captions(tab, form, load)
    gr.on([component.change for component in looked_at], trigger_mode="always_last", **look)
    load(None, [session], [session], js=_NEW_SESSION).then(**look)
    return DatasetTab(look, [pictures.cards.change, pictures.cards.input])


@dataclass(frozen=True)
class _Tab:
    """The parts that the tab's events connect. `look`: the event that redraws the images."""

    context: AppContext
    session: gr.BrowserState
    intake: Intake
    pictures: Pictures
    bulk: Bulk
    look: dict[str, Any]


def _connect_intake(tab: _Tab, form: ConfigForm) -> None:
    """Dropped images, sample icons, and images that come back."""
    context, session, intake, pictures = tab.context, tab.session, tab.intake, tab.pictures
    others = [form.by_name[name] for name in ("instance_data_dir", "dataset_name")]
    prefer: dict[str, Any] = {
        "fn": prefer_upload,
        "inputs": [intake.saved_count, pictures.message, *others],
        "outputs": [pictures.message, *others],
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    outputs = [pictures.message, intake.saved_count]
    intake.drop.upload(
        partial(upload, context), [session, intake.drop], [session, intake.drop, *outputs], api_name="upload"
    ).then(**tab.look).success(**prefer)
    intake.samples_button.click(
        partial(load_samples_icons, context), [session], [session, *outputs], api_name="load_samples"
    ).success(**tab.look).success(**prefer)
    intake.restore_button.click(partial(restore_removed, context), [session], [pictures.message]).success(**tab.look)


def _connect_removal(tab: _Tab) -> None:
    """All images or all captions after a question; each image is removed on its card."""
    context, session, pictures = tab.context, tab.session, tab.pictures
    pictures.cards.submit(**tab.look)
    confirm_before(pictures.remove_all_button, pictures.before_images)
    confirm_before(tab.intake.empty_button, pictures.before_captions)
    gone = pictures.before_images.yes.click(partial(remove_all, context), [session], [pictures.message])
    gone.then(**tab.look).then(**pictures.before_images.hidden)
    emptied = pictures.before_captions.yes.click(partial(empty_captions, context), [session], None)
    emptied.then(**tab.look).then(**pictures.before_captions.hidden)


def _connect_captions(tab: _Tab, form: ConfigForm, load: Any) -> None:
    """Captions from names, by a model and by hand, and their trigger word.

    The images are redrawn after an error too, since some captions may have changed before it.
    """
    context, session, intake, bulk = tab.context, tab.session, tab.intake, tab.bulk
    output, look = [tab.pictures.message], tab.look
    _afterwards(intake.from_names_button.click(partial(caption_all, context), [session, intake.trigger], output), look)
    described = intake.by_model_button.click(
        _captioning(context),
        [session, intake.model, intake.trigger],
        output,
        concurrency_limit=1,
        api_name="caption_by_model",
    )
    _afterwards(described, look)
    preview, used = form.by_name["validation_prompt"], gr.State(TRIGGER)
    # The kept prompt has the kept word in it.
    remember_fields(load, "dataset", {"trigger": intake.trigger}).then(
        str.strip, [intake.trigger], [used], show_progress="hidden", api_visibility="private"
    )
    gr.on(
        [intake.trigger.blur, intake.trigger.submit],
        use_trigger,
        [preview, intake.trigger, used],
        [preview, used],
        api_visibility="private",
    ).then(**look)
    saved = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
    tab.pictures.cards.input(partial(count_captions, context), [session], [tab.pictures.count], **saved)
    bulk.how.change(lambda how: gr.Textbox(visible=how == REPLACE), [bulk.how], [bulk.by], show_progress="hidden")
    changing: list[gr.components.Component] = [session, bulk.how, bulk.text, bulk.by]
    _afterwards(bulk.change.click(partial(change_all, context), changing, output), look)
    _afterwards(bulk.undo.click(partial(undo_captions, context), [session], output), look)


def _afterwards(event: Any, what: dict[str, Any]) -> None:
    """Run after success and after failure; Gradio's `then` alone runs after success only."""
    event.then(**what)
    event.failure(**what)


def _captioning(context: AppContext) -> Any:
    """The handler with Gradio's progress, which only a plain function's default gets."""

    def caption(session: str, model: str, trigger: str, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        return caption_by_model(context, session, model, trigger, lambda done, of: progress((done, of), unit="images"))

    return caption


def _resolution(text: str) -> int | None:
    """None for an invalid size, as while it is being typed."""
    try:
        return DataConfig(resolution=int(text)).resolution
    except ValueError:
        return None


def _rejections(result: UploadResult) -> str:
    lines = [f"<li>{html.escape(item.name)}: {html.escape(item.reason)}</li>" for item in result.rejected]
    return f'<div class="fl-card fl-bad"><b>Not taken</b><ul>{"".join(lines)}</ul></div>' if lines else ""
