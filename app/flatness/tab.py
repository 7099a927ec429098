"""The Flatness tab: how the loss rises around the weights of finished runs, as charts, tables and a surface."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..widgets.confirm import build_confirmation, confirm_before
from ..widgets.html import read_static
from ..widgets.status import STATUS_CSS, error_line
from ..widgets.ticks import fingerprint_of, skip_unchanged
from .view import QUICK, THOROUGH, FlatnessView

_POLL_SECONDS = 1.5
_EFFORTS = [("Quick look", QUICK), ("Thorough, with the curvature; takes many times as long", THOROUGH)]
_CSS = read_static("empty.css", "flatness.css")


def measure(view: FlatnessView, session: str, runs: list[str], effort: str) -> str:
    """Queue the measurement; the status, or what is wrong with the choice."""
    try:
        view.measure(runs or [], effort, session)
    except ConfigError as error:
        return error_line(str(error))
    return view.status()


def refresh(
    view: FlatnessView, known: Any, chosen_runs: list[str], chosen: int | None, told_of: str
) -> tuple[Any, ...]:
    """(runs, results, status, stop button, state, the status's HTML); unchanged outputs are skipped.

    A new result is selected; an error about a choice stays until something changes.
    """
    runs, results, status = view.runs(), view.results(), view.status()
    ids, numbers = [run_id for _, run_id in runs], [number for _, number in results]
    is_measuring = view.open_job() is not None
    now = [ids, numbers, is_measuring]
    is_drawn = status == told_of
    shown = gr.skip() if is_drawn else status
    if known is not None and known[:2] == now[:2]:
        stop = gr.skip() if known[2] == is_measuring else gr.update(visible=is_measuring)
        return gr.skip(), gr.skip(), shown, stop, now, status
    kept = [run for run in chosen_runs or () if run in ids] or view.newest()
    is_new = known is None or numbers[:1] != known[1][:1]
    newest = numbers[0] if numbers else None
    return (
        gr.update(choices=runs, value=kept),
        gr.update(choices=results, value=newest if is_new or chosen not in numbers else chosen, visible=bool(numbers)),
        shown,
        gr.update(visible=is_measuring),
        now,
        status,
    )


def show(view: FlatnessView, chosen: int | None) -> tuple[Any, ...]:
    """(charts, tables, their fold, the surface's fold, the surface, not loaded yet) of the chosen measurement."""
    try:
        result = view.result(chosen)
    except ConfigError as error:
        return error_line(str(error)), "", gr.update(visible=False), gr.update(visible=False), ""
    is_there = chosen is not None
    return result.charts, result.tables, gr.update(visible=is_there), gr.update(visible=is_there, open=False), ""


def build_flatness_tab(context: AppContext, load: Callable[..., Any]) -> gr.Timer:
    """Build the tab into the Blocks that is open. Returns its timer, which does not tick yet.

    `load`: the page's load event.
    """
    view = FlatnessView(context)
    known, told_of = gr.State(None), gr.State("")
    with gr.Row():
        runs = gr.Dropdown(
            [],
            multiselect=True,
            label="Runs",
            info="Finished runs of one base and one set of images. The base itself is always measured too.",
            scale=3,
            min_width=280,
        )
        effort = gr.Radio(_EFFORTS, value=QUICK, label="Effort", scale=2, min_width=280)
    with gr.Row():
        start = gr.Button("Measure", variant="primary", min_width=120, elem_id="fl-measure")
    with gr.Column(visible=False) as stopping:
        stop = gr.Button("Stop measuring", variant="stop", min_width=120, elem_id="stop-measuring")
        question = build_confirmation("stop-measuring", "Yes, stop and lose what was measured", "No, go on")
    status = gr.HTML("", css_template=STATUS_CSS, elem_id="fl-flatness-status")
    chosen = gr.Dropdown([], label="Measurement", visible=False)
    charts = gr.HTML(view.result(None).charts, css_template=_CSS, elem_id="fl-flatness-charts")
    with gr.Accordion("Surface in 3-D, to turn and zoom", open=False, visible=False) as fold:
        surface = gr.HTML("", css_template=_CSS, elem_id="fl-flatness-surface")
    with gr.Accordion("All figures, as tables", open=False, visible=False) as of_tables:
        tables = gr.Markdown("", elem_id="fl-flatness-tables", elem_classes="table-wrap")
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    watch = {
        "fn": partial(refresh, view),
        "inputs": [known, runs, chosen, told_of],
        "outputs": [runs, chosen, status, stopping, known, told_of],
        **quiet,
    }

    def on_measure(request: gr.Request, runs: list[str], effort: str) -> str:
        return measure(view, request.session_hash or "", runs, effort)

    start.click(on_measure, [runs, effort], [status], **quiet).then(**question.hidden)
    confirm_before(stop, question)
    question.yes.click(view.stop, None, None, **quiet).then(**question.hidden)
    chosen.change(partial(show, view), [chosen], [charts, tables, of_tables, fold, surface], **quiet)
    fold.expand(view.surface, [chosen], [surface], **quiet)
    runs.input(view.status, None, [status], **quiet)
    load(**watch)
    timer = gr.Timer(_POLL_SECONDS, active=False)
    timer.tick(**skip_unchanged(watch, partial(fingerprint_of, context)))
    return timer
