"""The parts of the Dataset tab on the page: where images come in, how they are shown, their captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from ..context import AppContext
from ..forms.forms import PLACED_WITH_THE_IMAGES, ConfigForm
from ..uploads.captions import TRIGGER
from ..widgets.confirm import Confirmation, build_confirmation
from ..widgets.messages import note
from .captioning import CHANGES, REPLACE, installed_captioners
from .cards import CARDS_CSS, CARDS_SCRIPT, card_functions

RESTORE_REMOVED = "Bring back the images from before"
_CAPTIONER_HERE = "found on this computer; only images without a caption get one"
_NO_CAPTIONER = (
    "none is on this computer yet: give its folder, or its name on the Hugging Face hub. A BLIP or Florence-2 model, "
    "such as Salesforce/blip-image-captioning-base or florence-community/Florence-2-base, writes sentences; a tagger, "
    "such as SmilingWolf/wd-swinv2-tagger-v3, writes tags. Only images without a caption get one"
)
_LOOKING = "Loading your images; the first time takes some seconds."


@dataclass(frozen=True)
class Intake:
    """Where images and captions come from. `saved_count`: how many images the last drop brought."""

    drop: gr.File
    samples_button: gr.Button
    restore_button: gr.Button
    trigger: gr.Textbox
    from_names_button: gr.Button
    model: gr.Dropdown
    by_model_button: gr.Button
    empty_button: gr.Button
    saved_count: gr.State


@dataclass(frozen=True)
class Pictures:
    """The cards of the images, and the questions before all images or all captions go."""

    count: gr.HTML
    message: gr.HTML
    filled: gr.Column
    cards: gr.HTML
    remove_all_button: gr.Button
    before_images: Confirmation
    before_captions: Confirmation


@dataclass(frozen=True)
class Bulk:
    """The controls of an edit to all captions, and of its undo."""

    how: gr.Radio
    text: gr.Textbox
    by: gr.Textbox
    change: gr.Button
    undo: gr.Button


def build_intake(context: AppContext, form: ConfigForm) -> Intake:
    drop = gr.File(
        label="Drop images or a zip here", file_count="multiple", type="filepath", height=150, elem_id="drop"
    )
    samples = gr.Button("Load the 23 sample icons", elem_id="load-samples")
    restore_removed = gr.Button(RESTORE_REMOVED, visible=False, elem_id="bring-back")
    with gr.Group():
        trigger = gr.Textbox(
            TRIGGER, label="Trigger word", info="a made-up word that stands for your style in prompts"
        )
        from_names = gr.Button("Write all captions from file names", elem_id="captions-from-names")
    installed = installed_captioners(list(map(Path, context.settings.data_dir)))
    with gr.Accordion("Caption with a model", open=bool(installed)):
        model = gr.Dropdown(
            installed,
            value=installed[0] if installed else None,
            label="Captioning model",
            info=_CAPTIONER_HERE if installed else _NO_CAPTIONER,
            allow_custom_value=True,
            elem_id="captioner",
        )
        with gr.Row():
            by_model = gr.Button("Caption with a model", elem_id="captions-by-model", min_width=120)
            empty = gr.Button("Empty all captions", variant="stop", min_width=120, elem_id="empty-captions")
    with gr.Accordion("How images are cropped and shown to the trainer", open=False):
        for name in PLACED_WITH_THE_IMAGES:
            form.by_name[name].render()
    return Intake(drop, samples, restore_removed, trigger, from_names, model, by_model, empty, saved_count=gr.State(0))


def build_pictures(context: AppContext) -> tuple[Pictures, Bulk]:
    count = gr.HTML(note(_LOOKING), elem_id="caption-count", padding=False)
    message = gr.HTML(padding=False)
    with gr.Column(visible=False) as filled:
        bulk, remove_all = _build_bulk()
        questions = (
            build_confirmation("remove-all", "Yes, remove all images", "No, keep them"),
            build_confirmation("empty-captions", "Yes, empty all captions", "No, keep them"),
        )
        cards = gr.HTML(
            "",
            css_template=CARDS_CSS,
            js_on_load=CARDS_SCRIPT,
            server_functions=card_functions(context),
            elem_id="cards",
        )
    return Pictures(count, message, filled, cards, remove_all, *questions), bulk


def _build_bulk() -> tuple[Bulk, gr.Button]:
    """Controls for all images, above them so that a confirmation is in view; and the button that removes all."""
    with gr.Accordion("Change all captions", open=False, elem_id="bulk"):
        how = gr.Radio(list(CHANGES), value=REPLACE, show_label=False, label="What to change in all captions")
        with gr.Row():
            text = gr.Textbox(label="Text", max_lines=1, min_width=160, elem_id="bulk-text")
            by = gr.Textbox(label="In its place", max_lines=1, min_width=160, elem_id="bulk-by")
        change = gr.Button("Change all captions", size="sm", elem_id="bulk-change")
    with gr.Row():
        undo = gr.Button("Undo the last change of captions", size="sm", elem_id="undo-captions", min_width=140)
        remove_all = gr.Button("Remove all images", variant="stop", size="sm", elem_id="remove-all", min_width=140)
    return Bulk(how, text, by, change, undo), remove_all
