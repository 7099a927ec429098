"""How far the chosen run learned each training image, as a table that is filled when it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from flatlora_diffusion.charts.sparkline import curve_limits, relative, sparkline
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.data.dataset import Sample, SampleSet, own_captions
from flatlora_diffusion.evaluation.image_changes import (
    EXPLANATION,
    ImageChange,
    ImageChanges,
    caption_text,
    change_text,
    highlights,
    image_changes,
)
from flatlora_diffusion.storage.atomic_io import file_sha256
from flatlora_diffusion.storage.formatting import figure
from flatlora_diffusion.storage.run_dir import RunDir

from ..context import AppContext
from ..dataset.thumbnails import Thumbnails
from ..forms.labels import LABELS
from ..runs.runs import Run
from ..widgets.html import data_url, empty_page, read_static
from ..widgets.messages import show_errors
from ..widgets.run_cards import method_name
from ..widgets.theme import COLOURS, NO_METHOD

TABLE_CSS = read_static("empty.css", "image_table.css")
_SIDE = 96  # pixels of a thumbnail
NOT_MEASURED = empty_page(
    "Not measured in this run",
    f"Set “{LABELS['image_loss_draws']}” in the Train tab to 8: the run then shows which images it learns too well or "
    "not at all.",
)


@dataclass(frozen=True)
class Source:
    """A training image that is still there as it was trained on.

    Attributes:
        name: the user's file name.
        looks_like: the name of an earlier image that looks like it; empty without.
    """

    name: str
    picture: Image.Image
    caption: str
    looks_like: str


@dataclass(frozen=True)
class ImageTableParts:
    fold: gr.Accordion
    table: gr.HTML


def build_image_table() -> ImageTableParts:
    with gr.Accordion("Loss by image", open=False, visible=False, elem_id="image-losses") as fold:
        table = gr.HTML("", css_template=TABLE_CSS, padding=False)
    return ImageTableParts(fold, table)


def close(run_id: str | None) -> tuple[gr.Accordion, str]:
    """(accordion, empty table) for another run."""
    return gr.Accordion(open=False, visible=bool(run_id)), ""


def fill(context: AppContext, thumbnails: Thumbnails, run_id: str | None) -> str:
    """The table of the run."""
    if not run_id:
        return ""
    with show_errors():
        run = context.runs.get(run_id)
        page: str = context.runs.cached(run, "loss by image", lambda: image_table(context, thumbnails, run))
    return page


def connect_image_table(context: AppContext, parts: ImageTableParts, chosen: gr.Dropdown) -> None:
    """`chosen`: the run whose images are shown."""
    given: dict[str, Any] = {"inputs": [chosen], "preprocess": False, "api_visibility": "private"}
    thumbnails = Thumbnails(context.uploads.folder / "thumbnails")
    chosen.change(close, outputs=[parts.fold, parts.table], show_progress="hidden", **given)
    parts.fold.expand(partial(fill, context, thumbnails), outputs=[parts.table], **given)


def image_table(context: AppContext, thumbnails: Thumbnails, run: Run) -> str:
    """A row for each image, least learned first; advice if the run has not measured them."""
    changes = image_changes([context.runs.events(run.id).image_losses()])
    if changes is None:
        return NOT_MEASURED
    sources = _sources(context, thumbnails, run, changes)
    colour = COLOURS.get(method_name(run.method), NO_METHOD)
    limits = curve_limits(image.curve for image in changes.images)
    rows = "".join(_row(image, changes, sources.get(image.name), limits, colour) for image in changes.images)
    heads = ("Training image", "Effect of the caption", "Loss before", "after", "Change")
    spans = (2, 1, 1, 1, 2)
    head = "".join(f'<th scope="col" colspan="{span}">{text}</th>' for text, span in zip(heads, spans, strict=True))
    shown = {image.name: source.name for image in changes.images if (source := sources.get(image.name))}
    found = "".join(
        f"<p><b>{reason}:</b> {escape(', '.join(shown.get(name, name) for name in names))}</p>"
        for reason, names in highlights(changes.images).items()
    )
    return (
        f'{found}<p class="fl-says">{escape(EXPLANATION)}</p>'
        '<div class="fl-scroll" tabindex="0" role="group" aria-label="Loss by image"><table class="fl-images">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(
    image: ImageChange, changes: ImageChanges, source: Source | None, limits: tuple[float, float], colour: str
) -> str:
    name, caption, picture, notes = escape(image.name), "", "", []
    if source is not None:
        name, caption = escape(source.name), escape(source.caption)
        picture = f'<img src="{data_url(source.picture)}" alt="" loading="lazy">'
        notes = [f"looks like {escape(source.looks_like)}"] if source.looks_like else []
    change = change_text(image.change)
    chart = sparkline(changes.steps, relative(image.curve), limits, colour, f"loss of {image.name}: {change}")
    small = "".join(f"<small>{text}</small>" for text in (caption, *notes) if text)
    doubt = _mark("check the caption") if image.has_doubtful_caption else ""
    mark = _mark(f"learned {image.mark}") if image.mark else ""
    return (
        f'<tr><td>{picture}</td><th scope="row">{name}{small}</th><td>{caption_text(image.caption_effect)}{doubt}</td>'
        f"<td>{figure(image.curve[0], 4)}</td><td>{figure(image.curve[-1], 4)}</td><td>{chart}</td>"
        f"<td>{change}{mark}</td></tr>"
    )


def _mark(text: str) -> str:
    return f'<small class="fl-mark">{text}</small>'


def _sources(context: AppContext, thumbnails: Thumbnails, run: Run, changes: ImageChanges) -> dict[str, Source]:
    """The images that are still in the run's folder of images with the content they had, by the run's names."""
    folder, settings = _folder(context, run), context.runs.settings(run.id)
    if folder is None:
        return {}
    hashes = {row["id"]: row["sha256"] for row in RunDir(run.folder).manifest()}
    names = [image.name for image in changes.images]
    samples: list[Sample] = []
    for name in sorted(names):
        path = folder / name
        if Path(name).name == name and path.is_file() and file_sha256(path) == hashes.get(name):
            samples.append(thumbnails.inspect(path).sample)
    captions = _captions(folder, samples, settings)
    shown, background = context.uploads.names_in(folder), str(settings.get("background_color") or "white")
    twins = dict(SampleSet(samples, 0, []).duplicates())
    return {
        sample.id: Source(
            shown.get(sample.id, sample.id),
            thumbnails.picture(folder / sample.id, sample.sha256, background, (_SIDE, _SIDE)),
            captions[sample.id],
            shown.get(twin, twin) if (twin := twins.get(sample.id)) else "",
        )
        for sample in samples
    }


def _captions(folder: Path, samples: list[Sample], settings: Mapping[str, Any]) -> dict[str, str]:
    """The captions by name, empty if the folder's file of captions cannot be read any more."""
    paths = [folder / sample.id for sample in samples]
    try:
        own = own_captions(folder, paths, settings.get("caption_column"))
    except ConfigError:
        own = {}
    return {path.name: own.get(path.name) or str(settings.get("instance_prompt") or "") for path in paths}


def _folder(context: AppContext, run: Run) -> Path | None:
    """The folder of the run's images; None if it is gone or may not be read."""
    place = context.runs.settings(run.id).get("instance_data_dir")
    frozen = context.uploads.frozen_copy(place)
    if frozen is not None:
        return frozen
    is_there = bool(place) and context.allowed_paths.may_read(str(place)) and Path(str(place)).is_dir()
    return Path(str(place)) if is_there else None
