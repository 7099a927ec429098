"""The tab with all runs: look, label, download, delete, clone, resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from flatlora_diffusion.config import METHODS, ConfigError, RunError, TrainConfig

from ..context import AppContext
from ..dataset.tab import ensure_session
from ..forms.forms import ConfigForm
from ..runs.lora_import import Origin, import_lora_file, known_bases, origin_of
from ..train.tab import TrainTab
from ..widgets.confirm import Confirmation, build_confirmation, confirm_before
from ..widgets.loss_chart import CHART_CSS, loss_curves
from ..widgets.messages import note, show_errors
from ..widgets.run_cards import run_card
from ..widgets.sample_strip import STRIP_CSS, STRIP_SCRIPT, samples
from ..widgets.status import STATUS_CSS, error_line, status_line
from .clone import clone_run
from .image_table import build_image_table, connect_image_table
from .report import build_report, connect_report
from .run_list import NEWEST, NO_RUNS, ORDERS, RUNS_CSS, RUNS_SCRIPT, filter_and_sort, list_page, rows_of, storage_line
from .trash import build_trash, connect_trash, look as look_at_trash

_DOWNLOADS = {
    "diffusers": "Download for diffusers",
    "kohya": "Download for ComfyUI, A1111 and others",
    "model_card": "Download the model card",
}


def refresh(context: AppContext, chosen: str | None, words: str, order: str) -> tuple[Any, ...]:
    """(list, run choice with `chosen` kept, storage, trash accordion, trash entries)."""
    rows = rows_of(context)
    ids = [row.id for row in rows]
    value = chosen if chosen in ids else (ids[0] if ids else None)
    page = list_page(filter_and_sort(rows, words, order), order, value, is_searched=bool(rows))
    choice = gr.Dropdown(choices=[(row.name, row.id) for row in rows], value=value)
    return page, choice, note(storage_line(context, rows)), *look_at_trash(context)


class Details(NamedTuple):
    """One value for each component that describes the chosen run; `gr.skip()` leaves a component unchanged."""

    card: Any
    curves: Any
    samples: Any
    settings: Any
    name: Any
    tags: Any
    note: Any
    diffusers: Any
    kohya: Any
    model_card: Any
    resume: Any
    clone: Any


def details(context: AppContext, run_id: str | None) -> Details:
    """Describe a run; without one the components are empty and the buttons disabled."""
    if not run_id:
        no_file, no_button = gr.DownloadButton(interactive=False), gr.Button(interactive=False)
        return Details(
            card="",
            curves=gr.HTML(visible=False),
            samples=gr.HTML(visible=False),
            settings={},
            name="",
            tags="",
            note="",
            **dict.fromkeys(_DOWNLOADS, no_file),
            resume=no_button,
            clone=no_button,
        )
    with show_errors():
        run = context.runs.get(run_id)
        origin = origin_of(run.folder)
        files, settings = context.runs.exports(run_id), context.runs.settings(run_id)
    default = TrainConfig().to_dict()
    return Details(
        card=run_card(run) if origin is None else _imported_card(run.name, origin),
        curves=loss_curves(context, [run]),
        samples=samples(context, [run]),
        settings={name: value for name, value in settings.items() if value != default.get(name)},
        name=run.name,
        tags=", ".join(run.label.tags),
        note=run.label.note,
        **{kind: gr.DownloadButton(value=files.get(kind), interactive=kind in files) for kind in _DOWNLOADS},
        resume=gr.Button(interactive=run.is_resumable),
        clone=gr.Button(interactive=origin is None),
    )


def look_again(context: AppContext, run_id: str | None) -> Details:
    """Describe the run as it is now, but leave its labels alone: somebody may be editing them."""
    return details(context, run_id)._replace(name=gr.skip(), tags=gr.skip(), note=gr.skip())


def take_lora(context: AppContext, file: str | None, base: str) -> tuple[Any, ...]:
    """Import an uploaded LoRA file; (status, run choice, emptied upload)."""
    if not file:
        return error_line("no file was given; drop a .safetensors file first"), gr.skip(), gr.skip()
    try:
        if base and base not in known_bases(context.runs):
            context.allowed_paths.check_model("base", base)
        taken = import_lora_file(context.runs, Path(file), base or "")
    except (ConfigError, RunError) as error:
        return error_line(str(error)), gr.skip(), None
    finally:
        Path(file).unlink(missing_ok=True)  # the entry has its own copy
    rest = f"; {taken.unknown} tensors of no layer were left out" if taken.unknown else ""
    text = f"{taken.run} is among the runs now, with {taken.layers} layers{rest}. Choose it on the Compare tab."
    return status_line(text), gr.Dropdown(choices=_choices(context), value=taken.run), None


def _choices(context: AppContext) -> list[tuple[str, str]]:
    return [(run.name, run.id) for run in context.runs.all()]


def save_labels(context: AppContext, run_id: str | None, name: str, tags: str, note: str) -> None:
    """Keep name, tags (with commas) and note."""
    with show_errors():
        context.runs.rename(run_id or "", name)
        context.runs.tag(run_id or "", *tags.split(","))
        context.runs.note(run_id or "", note)


def delete(context: AppContext, run_id: str | None) -> None:
    """Move the run into the trash."""
    with show_errors():
        context.runs.delete(run_id or "")
    gr.Info("Moved to the trash below, where it can be restored.")


def undo(context: AppContext, key: str | None) -> Any:
    """Bring a deleted run back and choose it."""
    with show_errors():
        run_id = context.runs.trash.undo(key or "")
    return gr.Dropdown(choices=_choices(context), value=run_id)


def clone(context: AppContext, form: ConfigForm, session: str, run_id: str | None) -> list[Any]:
    """Select the Train tab and fill it with the run's name, method, settings and a note about its images."""
    session = ensure_session(context, session)
    with show_errors():
        made = clone_run(context, session, run_id or "")
    lines = "<br>".join(map(escape, made.messages))
    text = note(f"<b>Like {escape(made.name)}.</b> Change what should be different, then start it.<br>{lines}")
    return [
        gr.Tabs(selected="train"),
        session,
        made.name,
        METHODS[made.method].title,
        text,
        *form.write(made.settings),
    ]


def resume(context: AppContext, session: str, run_id: str | None) -> Any:
    """Queue the run to be resumed, and select the Train tab."""
    with show_errors():
        context.queue.add_resume(run_id or "", session)
    return gr.Tabs(selected="train")


def _imported_card(name: str, origin: Origin) -> str:
    ranks = "-".join(str(rank) for rank in dict.fromkeys((origin.ranks[0], origin.ranks[-1])))
    facts = f"{origin.layers} layers, rank {ranks} · SHA-256 {origin.sha256[:12]}"
    return (
        f'<div class="fl-card"><div class="fl-head"><b>{escape(name)}</b><span>imported</span></div>'
        f'from {escape(origin.name)}<br><span class="fl-faint">{facts}</span></div>'
    )


@dataclass(frozen=True)
class CloneTarget:
    """Where a run's settings and images go when it is cloned. `look_at_images`: the event that redraws the images."""

    form: ConfigForm
    session: gr.BrowserState
    tabs: gr.Tabs
    train: TrainTab
    look_at_images: dict[str, Any]


def build_runs_tab(context: AppContext, selected: Callable[..., Any], target: CloneTarget | None) -> None:
    """Build the tab into the open Blocks.

    Args:
        selected: the event of this tab coming to the front.
        target: None builds no event that changes, imports or trains anything.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=330):
            with gr.Row():
                words = gr.Textbox("", label="Search", placeholder="name, method, base, tag ...", min_width=150)
                order = gr.Dropdown(list(ORDERS), value=NEWEST, label="Order", min_width=150)
            table = gr.HTML(NO_RUNS, css_template=RUNS_CSS, js_on_load=RUNS_SCRIPT, elem_id="runs", padding=False)
            storage = gr.HTML(padding=False)
            refresh_button = gr.Button("Refresh", size="sm")
            with gr.Column(visible=target is not None):
                imported = _build_import(context)
        with gr.Column(scale=3, min_width=330, elem_id="run-details"):
            chosen = gr.Dropdown([], label="Run", info="also by a click in the list")
            report = build_report()
            parts = _build_details(is_changeable=target is not None)
            images = build_image_table()
    with gr.Column(visible=target is not None):
        trash = build_trash()
    redraw = {
        "fn": partial(refresh, context),
        "inputs": [chosen, words, order],
        "outputs": [table, chosen, storage, trash.fold, trash.entries],
    }
    private = {**redraw, "api_visibility": "private"}
    described: dict[str, Any] = {
        "inputs": [chosen],
        "outputs": [parts.outputs[name] for name in Details._fields],
        "show_progress": "hidden",
    }
    as_now = {"fn": partial(look_again, context), **described, "api_visibility": "private"}
    selected(**private).success(**as_now)
    refresh_button.click(**redraw, api_name="runs").success(**as_now)
    table.click(_picked, None, [chosen], show_progress="hidden")
    gr.on([words.change, order.change], trigger_mode="always_last", show_progress="hidden", **private)
    chosen.change(partial(details, context), **described, api_name="run", preprocess=False)
    connect_report(context, report, chosen)
    if target is None:
        return
    connect_image_table(context, images, chosen)
    import_button, import_form, import_status = imported
    taken = import_button.click(partial(take_lora, context), import_form, [import_status, chosen, import_form[0]])
    taken.success(**private)
    labels = [parts.outputs[name] for name in ("name", "tags", "note")]
    parts.save_button.click(partial(save_labels, context), [chosen, *labels], None).success(**private).success(
        partial(details, context), **described, api_visibility="private"
    )
    confirm_before(parts.delete_button, parts.question, chosen)
    deleted = parts.question.yes.click(partial(delete, context), [chosen], None)
    deleted.success(**private).then(**parts.question.hidden)
    restored = trash.restore_button.click(partial(undo, context), [trash.entries], [chosen])
    restored.success(**private).success(**as_now)
    connect_trash(context, trash, lambda event: event.success(**private))
    _connect_clone(context, parts, chosen, target)


def _connect_clone(context: AppContext, parts: _DetailParts, chosen: gr.Dropdown, target: CloneTarget) -> None:
    """Clone the run into the Train tab, or resume it there."""
    form, train = target.form, target.train
    cloned = [target.tabs, target.session, train.name, train.method, train.status, *form.components]
    parts.outputs["clone"].click(partial(clone, context, form), [target.session, chosen], cloned).success(
        **target.look_at_images
    ).success(**train.summary)
    parts.outputs["resume"].click(partial(resume, context), [target.session, chosen], [target.tabs])


@dataclass(frozen=True)
class _DetailParts:
    """The components of the chosen run; `outputs` by the fields of `Details`."""

    outputs: dict[str, Any]
    save_button: gr.Button
    delete_button: gr.Button
    question: Confirmation


def _build_details(is_changeable: bool) -> _DetailParts:
    outputs: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(min_width=280):
            outputs["card"] = gr.HTML(padding=False)
            outputs["curves"] = gr.HTML("", css_template=CHART_CSS, padding=False)
            outputs["samples"] = gr.HTML(
                "", css_template=STRIP_CSS, js_on_load=STRIP_SCRIPT, visible=False, padding=False
            )
        with gr.Column(min_width=280):
            for kind, text in _DOWNLOADS.items():
                outputs[kind] = gr.DownloadButton(text, interactive=False)
            with gr.Column(visible=is_changeable):
                with gr.Row():
                    outputs["clone"] = gr.Button("Clone settings", size="sm", min_width=90)
                    outputs["resume"] = gr.Button("Resume", interactive=False, size="sm", min_width=90)
                    delete_button = gr.Button("Delete", variant="stop", size="sm", min_width=90, elem_id="delete-run")
                question = build_confirmation("delete-run", "Yes, move it to the trash", "No, keep it")
                outputs["name"] = gr.Textbox(label="Name")
                outputs["tags"] = gr.Textbox(label="Tags, with commas")
                outputs["note"] = gr.Textbox(label="Note")
                save_button = gr.Button("Save name, tags and note")
            with gr.Accordion("Settings that differ from the defaults", open=False):
                outputs["settings"] = gr.JSON()
    return _DetailParts(outputs, save_button, delete_button, question)


def _build_import(context: AppContext) -> tuple[gr.Button, list[gr.components.Component], gr.HTML]:
    """The import button, the file and its base, and the status line."""
    with gr.Accordion("Import a LoRA, to compare it with yours", open=False):
        file = gr.File(label="LoRA, .safetensors", file_types=[".safetensors"], height=120)
        base = gr.Dropdown(
            known_bases(context.runs),
            label="For the base",
            info="A folder, a hub id, tiny or tiny_klein.",
            allow_custom_value=True,
        )
        import_button = gr.Button("Import", min_width=90)
        status = gr.HTML(css_template=STATUS_CSS)
    return import_button, [file, base], status


def _picked(event: gr.EventData) -> str:
    return str(event.run)
