"""The tab where images come in: upload, look, caption."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from flatlora_diffusion.config import SAMPLES, ConfigError, DataConfig, ModelConfig
from flatlora_diffusion.data.images import find_images

from ..context import AppContext
from ..reporting import note, told_on_the_page
from ..runs.removal import (
    BRING_BACK,
    CAPTIONS,
    IMAGES,
    NONE_CHOSEN,
    YES,
    ask,
    bring_back,
    choose,
    confirmed,
    remove_one,
)
from ..train.forms import PLACED_WITH_THE_IMAGES, ConfigForm
from .arrivals import UploadResult
from .captioning import (
    HEADERS,
    caption_all,
    caption_by_model,
    save_captions,
    undo_captions,
    use_trigger,
)
from .captions import TRIGGER, has_trigger
from .thumbnails import Thumbnails
from .view import framing, look_at

_EMPTY = (
    "<b>No images yet.</b><br>Drop 10 to 30 pictures of one style here, with captions in .txt files of the same names "
    "if you have some. To try it out, load the sample icons."
)
_LOOKING = "Looking for your images; the first time after a start takes some seconds."


def ensure_session(context: AppContext, session: str) -> str:
    """The browser's session, or a new one."""
    return session or context.uploads.new_session()


def show(context: AppContext, thumbnails: Thumbnails, session: str, trigger: str, *values: Any) -> tuple[Any, ...]:
    """Gallery, caption table, count, the table's rows again, and the parts of the page that are for images only.

    The last is the button for images that were removed.
    """
    back = gr.Button(visible=bool(session) and context.uploads.can_bring_back(session))
    if not session or not context.uploads.images(session):
        return [], [], note(_EMPTY), [], *[gr.Column(visible=False)] * 2, back
    try:
        background, has_buckets, base, resolution = values
        context.places.check_model("pretrained_model_name_or_path", base.strip())
        model = ModelConfig(pretrained_model_name_or_path=base.strip())
        framed = framing(model, _resolution(resolution), background, has_buckets)
        view = look_at(context.uploads, thumbnails, session, framed)
    except ConfigError as error:  # while a colour is being typed, so in place of the count and not as an alarm
        return *[gr.skip()] * 2, note(html.escape(str(error)), "fl-bad"), *[gr.skip()] * 3, back
    count = len(view.rows)
    shape = f"about {framed.size} x {framed.size}" if has_buckets else f"{framed.size} x {framed.size}"
    told = f"<b>{count} images, captions {view.captioned}/{count}</b>, shown as trained on: {shape} pixels"
    word = trigger.strip()
    if word and view.captioned and not any(has_trigger(row[2], word) for row in view.rows):
        told += f"<br>No caption has the trigger word {html.escape(word)}, so prompts with it will not call the style"
    return view.pictures, view.rows, note(told), view.rows, *[gr.Column(visible=True)] * 2, back


def upload(context: AppContext, session: str, files: Sequence[str] | None) -> tuple[str, None, str, int]:
    """Take the dropped files: the session, the emptied drop zone, what was refused, how many were taken."""
    session = ensure_session(context, session)
    try:
        result = context.uploads.add(session, [(Path(file).name, Path(file)) for file in files or ()])
    except ConfigError as error:
        return session, None, note(html.escape(str(error)), "fl-bad"), 0
    return session, None, _refusals(result), len(result.taken)


def load_samples_icons(context: AppContext, session: str) -> tuple[str, str, int]:
    """Take the sample icons, if there are no images that they would mix with: as `upload`."""
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
    return session, _refusals(result), len(result.taken)


def prefer_upload(taken: int, refused: str, folder: str, dataset: str) -> tuple[Any, Any, Any]:
    """What is told of a drop, image folder and data set of the Train tab: emptied when new images came to train on."""
    if not taken or not (folder or dataset):
        return gr.skip(), gr.skip(), gr.skip()
    text = "They will be trained on, in place of the image folder or data set that was set on the Train tab."
    return refused + note(f"<b>{taken} new images.</b> {text}"), "", ""


def build_dataset_tab(context: AppContext, form: ConfigForm, session: gr.BrowserState, load: Any) -> dict[str, Any]:
    """`load`: the page's load event. Returns the event that shows the images anew."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            drop = gr.File(
                label="Drop images or a zip here", file_count="multiple", type="filepath", height=150, elem_id="drop"
            )
            samples = gr.Button("Load the 23 sample icons", elem_id="load-samples")
            back = gr.Button(BRING_BACK, visible=False, elem_id="bring-back")
            with gr.Group():
                trigger = gr.Textbox(
                    TRIGGER, label="Trigger word", info="a made-up word that stands for your style in prompts"
                )
                by_name = gr.Button("Write all captions from file names", elem_id="captions-from-names")
            model, by_model, empty = _model_captioner()
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
                    remove = gr.Button(NONE_CHOSEN, interactive=False, size="sm", elem_id="remove-one", min_width=140)
                    remove_all = gr.Button("Remove all images", size="sm", elem_id="remove-all", min_width=140)
                with gr.Row(visible=False) as question:
                    yes = gr.Button(YES[IMAGES], variant="stop", size="sm", elem_id="remove-all-yes")
                    no = gr.Button("No, keep them", size="sm")
    with gr.Column(visible=False) as listed:
        table = _caption_table()
        undo = gr.Button("Undo the last change of captions", size="sm", elem_id="undo-captions")
    taken = gr.State(0)
    others = [form.by_name[name] for name in ("instance_data_dir", "dataset_name")]
    prefer: dict[str, Any] = {
        "fn": prefer_upload,
        "inputs": [taken, told, *others],
        "outputs": [told, *others],
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    chosen, shown, asked, used = gr.State(""), gr.State([]), gr.State(IMAGES), gr.State(TRIGGER)
    looked_at = (*PLACED_WITH_THE_IMAGES, "pretrained_model_name_or_path", "resolution")
    look = {
        "fn": partial(show, context, Thumbnails(context.uploads.folder / "thumbnails")),
        "inputs": [session, trigger, *(form.by_name[name] for name in looked_at)],
        "outputs": [gallery, table, count, shown, filled, listed, back],
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    drop.upload(partial(upload, context), [session, drop], [session, drop, told, taken], api_name="upload").then(
        **look
    ).success(**prefer)
    samples.click(
        partial(load_samples_icons, context), [session], [session, told, taken], api_name="load_samples"
    ).success(**look).success(**prefer)
    back.click(partial(bring_back, context), [session], [chosen, remove, told]).success(**look)
    by_name.click(partial(caption_all, context), [session, trigger], [told]).success(**look)
    by_model.click(
        _captioning(context), [session, model, trigger], [told], concurrency_limit=1, api_name="caption_by_model"
    ).success(**look)
    gallery.select(_picked_picture(context), [session, shown], [chosen, remove], show_progress="hidden")
    table.select(_picked_row(context), [session], [chosen, remove], show_progress="hidden")
    remove.click(partial(remove_one, context), [session, chosen], [chosen, remove]).success(**look)
    for button, what in ((remove_all, IMAGES), (empty, CAPTIONS)):
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
    save = partial(save_captions, context)
    # The last of several quick changes must not get lost; what is refused is shown again as it was.
    table.input(
        save, [session, shown, table], [count, shown], show_progress="hidden", trigger_mode="always_last"
    ).failure(**look)
    undo.click(partial(undo_captions, context), [session], [told]).success(**look)
    gr.on([form.by_name[name].change for name in looked_at], trigger_mode="always_last", **look)
    load(partial(ensure_session, context), [session], [session], show_progress="hidden").then(**look)
    return look


def _model_captioner() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """The model's name, the button that lets it write, the one that makes room for it."""
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
    return model, by_model, empty


def _caption_table() -> gr.Dataframe:
    table = gr.Dataframe(
        headers=HEADERS,
        type="pandas",  # with the headers, which tell whether columns were moved
        label="Captions: double-click one to change it, or press Enter on it",
        static_columns=[0, 1, 3],
        column_count=(len(HEADERS), "fixed"),
        column_widths=["9%", "16%", "50%", "25%"],
        wrap=True,
        interactive=True,
        buttons=[],
        elem_id="captions",
    )
    table.row_count = (1, "fixed")  # as an argument it is deprecated, and row_limits does nothing yet
    return table


def _captioning(context: AppContext) -> Any:
    """The handler with Gradio's progress, which only a plain function's default gets."""

    def caption(session: str, model: str, trigger: str, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        return caption_by_model(context, session, model, trigger, lambda done, of: progress((done, of), unit="images"))

    return caption


def _picked_picture(context: AppContext) -> Any:
    def picked(session: str, shown: list[list[str]], event: gr.SelectData) -> tuple[str, Any]:
        return choose(context, session, shown[event.index][0] if event.index < len(shown) else "")

    return picked


def _picked_row(context: AppContext) -> Any:
    def picked(session: str, event: gr.SelectData) -> tuple[str, Any]:
        return choose(context, session, str(event.row_value[0]))

    return picked


def _resolution(text: str) -> int | None:
    """None for what is no size yet, since it is asked for while it is typed."""
    try:
        return DataConfig(resolution=int(text)).resolution
    except ValueError:
        return None


def _refusals(result: UploadResult) -> str:
    lines = [f"<li>{html.escape(item.name)}: {html.escape(item.reason)}</li>" for item in result.refused]
    return f'<div class="fl-card fl-bad"><b>Not taken</b><ul>{"".join(lines)}</ul></div>' if lines else ""
