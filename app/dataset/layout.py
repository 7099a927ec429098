"""The parts of the Dataset tab on the page: where images come in, how they are shown, their captions."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from ..reporting import note
from ..runs.removal import BRING_BACK, IMAGES, NONE_CHOSEN, YES
from ..train.forms import PLACED_WITH_THE_IMAGES, ConfigForm
from .captioning import HEADERS
from .captions import TRIGGER

_LOOKING = "Looking for your images; the first time after a start takes some seconds."


@dataclass(frozen=True)
class Intake:
    """Where images and captions come from. `taken`: how many images the last drop brought."""

    drop: gr.File
    samples: gr.Button
    bring_back: gr.Button
    trigger: gr.Textbox
    from_names: gr.Button
    model: gr.Textbox
    by_model: gr.Button
    empty: gr.Button
    taken: gr.State


@dataclass(frozen=True)
class Pictures:
    """The images and their removal. `chosen`: the image to remove; `asked`: what the question is about."""

    count: gr.HTML
    told: gr.HTML
    filled: gr.Column
    gallery: gr.Gallery
    remove: gr.Button
    remove_all: gr.Button
    question: gr.Row
    yes: gr.Button
    no: gr.Button
    chosen: gr.State
    asked: gr.State


@dataclass(frozen=True)
class Captions:
    """The table of captions. `shown`: its rows as they were shown."""

    filled: gr.Column
    table: gr.Dataframe
    undo: gr.Button
    shown: gr.State


def build_intake(form: ConfigForm) -> Intake:
    drop = gr.File(
        label="Drop images or a zip here", file_count="multiple", type="filepath", height=150, elem_id="drop"
    )
    samples = gr.Button("Load the 23 sample icons", elem_id="load-samples")
    bring_back = gr.Button(BRING_BACK, visible=False, elem_id="bring-back")
    with gr.Group():
        trigger = gr.Textbox(
            TRIGGER, label="Trigger word", info="a made-up word that stands for your style in prompts"
        )
        from_names = gr.Button("Write all captions from file names", elem_id="captions-from-names")
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
    return Intake(drop, samples, bring_back, trigger, from_names, model, by_model, empty, taken=gr.State(0))


def build_pictures() -> Pictures:
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
    chosen, asked = gr.State(""), gr.State(IMAGES)
    return Pictures(count, told, filled, gallery, remove, remove_all, question, yes, no, chosen, asked)


def build_captions() -> Captions:
    with gr.Column(visible=False) as filled:
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
        undo = gr.Button("Undo the last change of captions", size="sm", elem_id="undo-captions")
    return Captions(filled, table, undo, shown=gr.State([]))
