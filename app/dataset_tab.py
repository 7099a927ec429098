"""The tab where images come in: upload, look, caption."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from app.context import AppContext
from app.dataset_view import look_at, training_size, trigger_captions
from app.forms import ConfigForm
from app.reporting import told_on_the_page
from app.uploads import UploadResult
from flatlora_diffusion.config import SAMPLES, ConfigError
from flatlora_diffusion.images import find_images

_HEADERS = ["Image", "File", "Caption", "Notes"]
_EMPTY = "No images yet. Drop 10 to 30 pictures of one style here, or load the sample icons."


def ensure_session(context: AppContext, session: str) -> str:
    """The browser's session, or a new one."""
    return session or context.uploads.new_session()


def show(
    context: AppContext, session: str, names: Mapping[str, str], background: str, base: str, resolution: str
) -> tuple[Any, Any, str]:
    """Gallery, caption table and count of the session's images."""
    if not session:
        return [], [], _note(_EMPTY)
    with told_on_the_page():
        size = training_size(base, int(resolution) if resolution.isdigit() else None)
        view = look_at(context.uploads, session, names or {}, background, size)
    if not view.rows:
        return [], [], _note(_EMPTY)
    count = len(view.rows)
    return (
        view.pictures,
        view.rows,
        _note(f"<b>captions {view.captioned}/{count}</b>, shown at {size} x {size} pixels"),
    )


def upload(
    context: AppContext, session: str, names: Mapping[str, str], files: Sequence[str] | None
) -> tuple[str, dict[str, str], None, str]:
    """Take the dropped files: the session, the users' names by image, the emptied drop zone, what was refused."""
    session = ensure_session(context, session)
    with told_on_the_page():
        result = context.uploads.add(session, [(Path(file).name, Path(file)) for file in files or ()])
    return session, {**(names or {}), **_names(result)}, None, _refusals(result)


def load_samples_icons(context: AppContext, session: str) -> tuple[str, dict[str, str], str]:
    """Put the sample icons in place of what the session has."""
    session = ensure_session(context, session)
    images, _ = find_images(SAMPLES / "icons_3d")
    captions = [path.with_suffix(".txt") for path in images]
    with told_on_the_page():
        context.uploads.clear(session)
        result = context.uploads.add(session, [(path.name, path) for path in (*images, *captions)])
    return session, _names(result), _refusals(result)


def save_captions(context: AppContext, session: str, rows: Sequence[Sequence[str]]) -> str:
    """Keep the table's captions; returns the new count."""
    captions = {row[0]: row[2] or "" for row in rows if row[0]}
    with told_on_the_page():
        context.uploads.save_captions(session, captions)
    return _note(f"<b>captions {sum(bool(text.strip()) for text in captions.values())}/{len(captions)}</b>, saved")


def caption_all(context: AppContext, session: str, names: Mapping[str, str], trigger: str) -> None:
    """Make all captions from the file names and the trigger word."""
    with told_on_the_page():
        if not trigger.strip():
            raise ConfigError("the trigger word is empty; take a word that means nothing else, such as TOK")
        present = context.uploads.captions(session) if session else {}
        known = {image: (names or {}).get(image, image) for image in present}
        context.uploads.save_captions(session, trigger_captions(known, trigger.strip()))


def clear(context: AppContext, session: str) -> dict[str, str]:
    """Remove all of the session's images."""
    if session:
        context.uploads.clear(session)
    return {}


def build_dataset_tab(context: AppContext, form: ConfigForm, session: gr.BrowserState, load: Any) -> None:
    """`load`: the page's load event."""
    names = gr.BrowserState({}, storage_key="flatlora-names", secret="browser only")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            drop = gr.File(
                label="Drop images or a zip here", file_count="multiple", type="filepath", height=150, elem_id="drop"
            )
            samples = gr.Button("Load the 23 sample icons", elem_id="load-samples")
            with gr.Row():
                trigger = gr.Textbox(
                    "TOK", label="Trigger word", info="stands for your style in prompts", min_width=140
                )
                caption = gr.Button("Captions from file names", min_width=140)
            form.by_name["background_color"].render()
            remove = gr.Button("Remove all images", variant="stop", size="sm")
        with gr.Column(scale=3, min_width=300):
            count = gr.HTML(_note(_EMPTY), elem_id="caption-count")
            refused = gr.HTML()
            gallery = gr.Gallery(
                label="As the trainer sees them (centre crop)", columns=6, height=330, object_fit="contain", buttons=[]
            )
    table = gr.Dataframe(
        headers=_HEADERS,
        type="array",
        label="Captions: double-click one to change it",
        static_columns=[0, 1, 3],
        column_count=4,
        wrap=True,
        interactive=True,
        buttons=[],
        elem_id="captions",
    )
    look = {
        "fn": partial(show, context),
        "inputs": [session, names]
        + [form.by_name[name] for name in ("background_color", "pretrained_model_name_or_path", "resolution")],
        "outputs": [gallery, table, count],
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    drop.upload(
        partial(upload, context), [session, names, drop], [session, names, drop, refused], api_name="upload"
    ).then(**look)
    samples.click(
        partial(load_samples_icons, context), [session], [session, names, refused], api_name="load_samples"
    ).then(**look)
    caption.click(partial(caption_all, context), [session, names, trigger], None).success(**look)
    remove.click(partial(clear, context), [session], [names]).then(**look)
    table.input(partial(save_captions, context), [session, table], [count], show_progress="hidden")
    for name in ("background_color", "resolution"):
        form.by_name[name].change(**look)
    load(partial(ensure_session, context), [session], [session], show_progress="hidden").then(**look)


def _names(result: UploadResult) -> dict[str, str]:
    return {taken.path.name: taken.original for taken in result.taken}


def _refusals(result: UploadResult) -> str:
    lines = [f"<li>{html.escape(item.name)}: {html.escape(item.reason)}</li>" for item in result.refused]
    return f'<div class="fl-card fl-bad"><b>Not taken</b><ul>{"".join(lines)}</ul></div>' if lines else ""


def _note(text: str) -> str:
    return f'<div class="fl-card">{text}</div>'
