"""Previews of runs over their steps: a row for each prompt, beginning with the base's picture.

The strip scrolls to the newest step unless the user has scrolled it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

import gradio as gr

from ..context import AppContext
from ..runs.progress import Preview
from ..runs.runs import Run
from .html import file_url, read_static
from .loss_chart import run_colours
from .theme import NO_METHOD

MAX_COLUMNS = 24
STRIP_CSS = read_static("sample_strip.css")
STRIP_SCRIPT = read_static("sample_strip.js")


def samples(context: AppContext, runs: list[Run]) -> gr.HTML:
    """The previews of the runs over their steps; hidden without previews."""
    page = sample_strips(context, runs, run_colours(runs))
    return gr.HTML(page, visible=bool(page))


def sample_strips(context: AppContext, runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    """HTML of the samples of each run that has any; empty without. colours: of the runs, by name."""
    found = [(run, context.runs.events(run.id).previews()) for run in runs]
    made = "".join(_strip(run, previews, colours.get(run.name, NO_METHOD)) for run, previews in found if previews)
    return made and f'<div class="fl-strips">{made}</div>'


def sampled_steps(steps: Sequence[int]) -> list[int]:
    """At most MAX_COLUMNS of the steps: the first, the last, and evenly spaced steps between."""
    every = -(-len(steps) // (MAX_COLUMNS - 1))
    return sorted({*steps[::every], *steps[-1:]})


def rows_of(previews: Sequence[Preview]) -> dict[str, dict[int, Preview]]:
    """The previews by row title and step: a row for each prompt and seed.

    Previews of earlier versions without prompts are numbered.
    """
    seeds = Counter(prompt for prompt, _ in {(one.prompt, one.seed) for one in previews})
    rows: dict[str, dict[int, Preview]] = {}
    for one in previews:
        title = f"Preview {one.place + 1}" if one.prompt is None else one.prompt or "(empty prompt)"
        if one.prompt is not None and seeds[one.prompt] > 1:
            title = f"{title} · seed {one.seed}"
        rows.setdefault(title, {})[one.step] = one
    return rows


def _strip(run: Run, previews: Sequence[Preview], colour: str) -> str:
    steps = sorted({one.step for one in previews})
    columns = sampled_steps(steps)
    some = "" if len(columns) == len(steps) else f"<span>{len(columns)} of {len(steps)} steps</span>"
    name = escape(run.name)
    heads = "".join(f'<th scope="col"{_kind(step)}>{_title(step)}</th>' for step in columns)
    bodies = "".join(_row(place, *row, columns) for place, row in enumerate(rows_of(previews).items()))
    table = f"<table><thead><tr>{heads}</tr></thead>{bodies}</table>"
    return (
        f'<section class="fl-strip" aria-label="Samples of {name}"><p class="fl-strip-head">'
        f'<b><i style="background:{colour}"></i>{name}</b>{some}</p>'
        f'<div class="fl-film" data-run="{escape(run.id)}">{table}</div></section>'
    )


def _row(place: int, title: str, pictures: Mapping[int, Preview], columns: Sequence[int]) -> str:
    text = escape(title)
    cells = "".join(f"<td{_kind(step)}>{_cell(place, text, step, pictures.get(step))}</td>" for step in columns)
    head = f'<tr><th scope="rowgroup" colspan="{len(columns)}"><span>{text}</span></th></tr>'
    return f"<tbody>{head}<tr>{cells}</tr></tbody>"


def _cell(place: int, text: str, step: int, preview: Preview | None) -> str:
    if preview is None or not preview.path.is_file():
        return '<span class="fl-none"></span>'
    return (
        f'<button type="button" data-sample="{place} {step}" aria-pressed="false" title="Larger or smaller">'
        f'<img src="{file_url(preview.path)}" alt="{text}, {_title(step).lower()}" loading="lazy" draggable="false">'
        "</button>"
    )


def _title(step: int) -> str:
    return f"Step {step}" if step else "Before training"


def _kind(step: int) -> str:
    return "" if step else ' class="fl-before"'
