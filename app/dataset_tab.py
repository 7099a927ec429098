"""The tab where images come in: upload, look, caption."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from app.captioning import caption_all, caption_by_model, empty_captions, save_captions, use_trigger
from app.captions import TRIGGER, has_trigger
from app.context import AppContext
from app.dataset_view import framing, look_at
from app.forms import PLACED_WITH_THE_IMAGES, ConfigForm
from app.reporting import note, told_on_the_page
from app.thumbnails import Thumbnails
from app.uploads import UploadResult
from flatlora_diffusion.config import SAMPLES, ConfigError, DataConfig, ModelConfig
from flatlora_diffusion.images import find_images

_HEADERS = ["Image", "File", "Caption", "Notes"]
_EMPTY = (
    "<b>No images yet.</b><br>Drop 10 to 30 pictures of one style here, with captions in .txt files of the same names "
    "if you have some. To try it out, load the sample icons."
)
_LOOKING = "Looking for your images; the first time after a start takes some seconds."
_IMAGES, _CAPTIONS = "images", "captions"
_YES = {_IMAGES: "Yes, remove all images", _CAPTIONS: "Yes, empty all captions"}
_NONE_CHOSEN = "Remove one image: choose it above"


def ensure_session(context: AppContext, session: str) -> str:
    """The browser's session, or a new one."""
    return session or context.uploads.new_session()


def show(context: AppContext, thumbnails: Thumbnails, session: str, trigger: str, *values: Any) -> tuple[Any, ...]:
    """Gallery, caption table, count, image names in order, and the parts of the page that are for images only."""
    if not session or not context.uploads.images(session):
        return [], [], note(_EMPTY), [], gr.Column(visible=False), gr.Column(visible=False)
    try:
        background, has_buckets, base, resolution = values
        context.places.check_model("pretrained_model_name_or_path", base.strip())
        model = ModelConfig(pretrained_model_name_or_path=base.strip())
        framed = framing(model, _resolution(resolution), background, has_buckets)
        view = look_at(context.uploads, thumbnails, session, framed)
    except ConfigError as error:  # while a colour is being typed, so in place of the count and not as an alarm
        return gr.skip(), gr.skip(), note(html.escape(str(error)), "fl-bad"), gr.skip(), gr.skip(), gr.skip()
    count = len(view.rows)
    shape = f"about {framed.size} x {framed.size}" if has_buckets else f"{framed.size} x {framed.size}"
    told = f"<b>{count} images, captions {view.captioned}/{count}</b>, shown as trained on: {shape} pixels"
    word = trigger.strip()
    if word and view.captioned and not any(has_trigger(row[2], word) for row in view.rows):
        told += f"<br>No caption has the trigger word {html.escape(word)}, so prompts with it will not call the style"
    order = [row[0] for row in view.rows]
    return view.pictures, view.rows, note(told), order, gr.Column(visible=True), gr.Column(visible=True)


def upload(context: AppContext, session: str, files: Sequence[str] | None) -> tuple[str, None, str]:
    """Take the dropped files: the session, the emptied drop zone, what was refused."""
    session = ensure_session(context, session)
    with told_on_the_page():
        result = context.uploads.add(session, [(Path(file).name, Path(file)) for file in files or ()])
    return session, None, _refusals(result)


def load_samples_icons(context: AppContext, session: str) -> tuple[str, str]:
    """Take the sample icons, if there are no images that they would mix with: the session, what was refused."""
    session = ensure_session(context, session)
    images, _ = find_images(SAMPLES / "icons_3d")
    captions = [path.with_suffix(".txt") for path in images]
    with told_on_the_page():
        present = len(context.uploads.images(session))
        if present:
            raise ConfigError(
                f"you have {present} images, and the samples would mix with their style; "
                "press Remove all images first if you want the samples in their place"
            )
        result = context.uploads.add(session, [(path.name, path) for path in (*images, *captions)])
    return session, _refusals(result)


def choose(context: AppContext, session: str, image: str) -> tuple[str, Any]:
    """The image to remove, and the button that does it and names it."""
    name = context.uploads.names(session).get(image) if session and image else None
    return (image, gr.Button(f"Remove {name}", interactive=True)) if name else ("", _no_choice())


def remove_one(context: AppContext, session: str, image: str) -> tuple[str, Any]:
    """Remove the chosen image; nothing is chosen then."""
    with told_on_the_page():
        if not image:
            raise ConfigError("no image is chosen; click one in the gallery or in the table")
        context.uploads.remove(session, image)
    return "", _no_choice()


def ask(what: str) -> tuple[Any, Any, str]:
    """The question before `what`, its button, and what it is about."""
    return gr.Row(visible=True), gr.Button(_YES[what]), what


def confirmed(context: AppContext, session: str, what: str) -> tuple[Any, ...]:
    """Do what was asked about: (the chosen image, its button, what was refused)."""
    if what == _IMAGES:
        return clear(context, session)
    empty_captions(context, session)
    return gr.skip(), gr.skip(), gr.skip()


def clear(context: AppContext, session: str) -> tuple[str, Any, str]:
    """Remove all of the session's images; nothing is chosen then, nothing refused."""
    if session:
        context.uploads.clear(session)
    return "", _no_choice(), ""


def build_dataset_tab(context: AppContext, form: ConfigForm, session: gr.BrowserState, load: Any) -> None:
    """`load`: the page's load event."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            drop = gr.File(
                label="Drop images or a zip here", file_count="multiple", type="filepath", height=150, elem_id="drop"
            )
            samples = gr.Button("Load the 23 sample icons", elem_id="load-samples")
            with gr.Group():
                trigger = gr.Textbox(
                    TRIGGER, label="Trigger word", info="a made-up word that stands for your style in prompts"
                )
                by_name = gr.Button("Write all captions from file names", elem_id="captions-from-names")
            with gr.Accordion("Caption with a model", open=False):
                model = gr.Textbox(
                    label="Captioning model",
                    info="folder or hub id of a BLIP model, such as Salesforce/blip-image-captioning-base; "
                    "only images without a caption get one",
                    elem_id="captioner",
                )
                with gr.Row():
                    by_model = gr.Button("Caption with a model", elem_id="captions-by-model", min_width=120)
                    empty = gr.Button("Empty all captions", min_width=120)
            with gr.Accordion("How images are cropped and shown to the trainer", open=False):
                for name in PLACED_WITH_THE_IMAGES:
                    form.by_name[name].render()
        with gr.Column(scale=3, min_width=300):
            count = gr.HTML(note(_LOOKING), elem_id="caption-count", padding=False)
            told = gr.HTML(padding=False)
            with gr.Column(visible=False) as filled:
                gallery = gr.Gallery(
                    label="As the trainer sees them (centre crop)",
                    show_label=False,
                    columns=6,
                    height=470,
                    object_fit="contain",
                    buttons=[],
                    interactive=False,
                    elem_id="pictures",
                    elem_classes="fl-gallery",
                )
                with gr.Row():
                    remove = gr.Button(_NONE_CHOSEN, interactive=False, size="sm", elem_id="remove-one", min_width=140)
                    remove_all = gr.Button("Remove all images", size="sm", elem_id="remove-all", min_width=140)
                with gr.Row(visible=False) as question:
                    yes = gr.Button(_YES[_IMAGES], variant="stop", size="sm", elem_id="remove-all-yes")
                    no = gr.Button("No, keep them", size="sm")
    with gr.Column(visible=False) as listed:
        table = gr.Dataframe(
            headers=_HEADERS,
            type="array",
            label="Captions: double-click one to change it, or press Enter on it",
            static_columns=[0, 1, 3],
            column_count=4,
            column_widths=["9%", "16%", "50%", "25%"],
            wrap=True,
            interactive=True,
            buttons=[],
            elem_id="captions",
        )
    chosen, order, asked, used = gr.State(""), gr.State([]), gr.State(_IMAGES), gr.State(TRIGGER)
    looked_at = (*PLACED_WITH_THE_IMAGES, "pretrained_model_name_or_path", "resolution")
    look = {
        "fn": partial(show, context, Thumbnails(context.uploads.folder / "thumbnails")),
        "inputs": [session, trigger, *(form.by_name[name] for name in looked_at)],
        "outputs": [gallery, table, count, order, filled, listed],
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    drop.upload(partial(upload, context), [session, drop], [session, drop, told], api_name="upload").then(**look)
    samples.click(partial(load_samples_icons, context), [session], [session, told], api_name="load_samples").success(
        **look
    )
    by_name.click(partial(caption_all, context), [session, trigger], [told]).success(**look)
    by_model.click(
        _captioning(context), [session, model, trigger], [told], concurrency_limit=1, api_name="caption_by_model"
    ).success(**look)
    gallery.select(_picked_picture(context), [session, order], [chosen, remove], show_progress="hidden")
    table.select(_picked_row(context), [session], [chosen, remove], show_progress="hidden")
    remove.click(partial(remove_one, context), [session, chosen], [chosen, remove]).success(**look)
    for button, what in ((remove_all, _IMAGES), (empty, _CAPTIONS)):
        button.click(partial(ask, what), None, [question, yes, asked], show_progress="hidden")
    preview = form.by_name["validation_prompt"]
    gr.on(
        [trigger.blur, trigger.submit],
        use_trigger,
        [preview, trigger, used],
        [preview, used],
        api_visibility="private",
    ).then(**look)
    no.click(lambda: gr.Row(visible=False), None, [question], show_progress="hidden")
    yes.click(partial(confirmed, context), [session, asked], [chosen, remove, told]).then(**look).then(
        lambda: gr.Row(visible=False), None, [question], show_progress="hidden"
    )
    table.input(partial(save_captions, context), [session, table], [count], show_progress="hidden")
    gr.on([form.by_name[name].change for name in looked_at], trigger_mode="always_last", **look)
    load(partial(ensure_session, context), [session], [session], show_progress="hidden").then(**look)


def _captioning(context: AppContext) -> Any:
    """The handler with Gradio's progress, which only a plain function's default gets."""

    def caption(session: str, model: str, trigger: str, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        return caption_by_model(context, session, model, trigger, lambda done, of: progress((done, of), unit="images"))

    return caption


def _picked_picture(context: AppContext) -> Any:
    def picked(session: str, order: list[str], event: gr.SelectData) -> tuple[str, Any]:
        return choose(context, session, order[event.index] if event.index < len(order) else "")

    return picked


def _picked_row(context: AppContext) -> Any:
    def picked(session: str, event: gr.SelectData) -> tuple[str, Any]:
        return choose(context, session, str(event.row_value[0]))

    return picked


def _no_choice() -> Any:
    return gr.Button(_NONE_CHOSEN, interactive=False)


def _resolution(text: str) -> int | None:
    """None for what is no size yet, since it is asked for while it is typed."""
    try:
        return DataConfig(resolution=int(text)).resolution
    except ValueError:
        return None


def _refusals(result: UploadResult) -> str:
    lines = [f"<li>{html.escape(item.name)}: {html.escape(item.reason)}</li>" for item in result.refused]
    return f'<div class="fl-card fl-bad"><b>Not taken</b><ul>{"".join(lines)}</ul></div>' if lines else ""
