"""The Compare tab: Base, LoRA and Flat-LoRA side by side, and a blind vote between two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import gradio as gr

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..widgets.browser_memory import remember_fields
from ..widgets.status import STATUS_CSS, error_line
from ..widgets.ticks import fingerprint_of, skip_unchanged
from .comparison import ComparedRun, default_seeds
from .grid import GRID_CSS, GRID_SCRIPT, WHILE_LOADING
from .picture_cache import PRECISIONS
from .view import (
    AUTOMATIC,
    BETWEEN,
    BY_CHECKPOINT,
    BY_PROMPT,
    BY_STRENGTH,
    GUIDANCES,
    PICTURES,
    STEPS,
    STRENGTHS,
    TO_BASE,
    CompareView,
    Form,
    Shown,
)
from .vote_tab import build_vote

_POLL_SECONDS = 1.5
_LOOKS = [("Pictures", PICTURES), ("Difference to the base", TO_BASE), ("LoRA against Flat-LoRA", BETWEEN)]
_RESIZE = "(size) => document.documentElement.style.setProperty('--fl-size', size + 'px')"
_ROWS = [("Prompts", BY_PROMPT), ("at several strengths", BY_STRENGTH), ("by checkpoint", BY_CHECKPOINT)]
_ROWS_INFO = "Checkpoints saved during the training, including the end of a run that was trained longer."
_PRECISIONS = [("Default of the device", AUTOMATIC), *((name, value) for value, name in PRECISIONS.items())]


@dataclass(frozen=True)
class CompareTab:
    """The parts that other tabs use.

    Attributes:
        timer: inactive at first.
        to_trained: the event that selects this tab and the newest runs.
    """

    timer: gr.Timer
    to_trained: dict[str, Any]


def build_compare_tab(
    context: AppContext, voter: gr.BrowserState, load: Callable[..., Any], tabs: gr.Tabs
) -> CompareTab:
    """Build the tab into the Blocks that is open.

    `voter`: who votes in this browser; `load`: the page's load event; `tabs`: of the page.
    """
    view = CompareView(context)
    with gr.Tabs():
        with gr.Tab("Side by side"):
            form, timer, known = _build_side_by_side(view, load)
        with gr.Tab("Blind vote"):
            build_vote(view, form, known, voter, load)
    to_trained: dict[str, Any] = {"fn": partial(show_trained, view), "inputs": None, "outputs": [tabs, form[0]]}
    return CompareTab(timer, to_trained | {"show_progress": "hidden", "api_visibility": "private"})


def show_trained(view: CompareView) -> tuple[Any, Any]:
    """Select the Compare tab and the newest trained runs in it."""
    arms = view.arms()
    ids = {arm.id for arm in arms}
    trained = [run_id for run_id in view.context.queue.recent_runs() if run_id in ids]
    return gr.Tabs(selected="compare"), gr.update(choices=run_choices(arms), value=trained)


def draw(view: CompareView, goes_first: bool, *values: Any, session: str = "") -> tuple[Any, ...]:
    """Queue the missing pictures, then show as `refresh` does; show an error beside a wrong form."""
    try:
        view.draw(Form(*values), session, goes_first)
    except ConfigError as error:
        return _outputs(replace(view.show(Form(*values)), status=error_line(str(error))), None)
    return refresh(view, None, *values)


def refresh(view: CompareView, last: Shown | None, *values: Any) -> tuple[Any, ...]:
    """(grid, status, PNG, HTML, stop button, state); outputs that equal `last` are skipped."""
    return _outputs(view.show(Form(*values)), last)


def choices(view: CompareView, known: list[str] | None, chosen: list[str], prompts: str) -> tuple[Any, ...]:
    """(runs, prompts, seeds, known ids) when the runs differ from `known`; initially the newest pair is chosen."""
    arms, newest, first_prompts = view.start()
    ids = [arm.id for arm in arms]
    if ids == known:
        return gr.skip(), gr.skip(), gr.skip(), gr.skip()
    kept = [run for run in chosen or () if run in ids] or newest
    is_first = not prompts and bool(first_prompts)
    seeds = gr.update(value=default_seeds(first_prompts)) if is_first else gr.skip()
    return gr.update(choices=run_choices(arms), value=kept), gr.update(value=prompts or first_prompts), seeds, ids


def run_choices(arms: list[ComparedRun]) -> list[tuple[str, str]]:
    """(label, id) of each run."""
    return [(f"{arm.name} · {arm.title}", arm.id) for arm in arms]


def _outputs(shown: Shown, last: Shown | None) -> tuple[Any, ...]:
    files = [gr.update(value=file and str(file), interactive=file is not None) for file in (shown.picture, shown.page)]
    outputs = (shown.grid, shown.status, *files, gr.update(visible=shown.can_stop))
    if last is not None:
        is_same = [now == before for now, before in zip(astuple(shown), astuple(last), strict=True)]
        outputs = tuple(gr.skip() if same else one for same, one in zip(is_same, outputs, strict=True))
    return *outputs, shown


def _build_side_by_side(
    view: CompareView, load: Callable[..., Any]
) -> tuple[list[gr.components.Component], gr.Timer, gr.State]:
    """The form's components in the order of `Form`, the timer of the tab, and the runs that can be chosen."""
    known, last = gr.State(None), gr.State(None)
    with gr.Row():  # side by side on a wide page only, where the pictures have room beside the form
        with gr.Column(scale=2, min_width=420):
            with gr.Row():
                with gr.Column(scale=3, min_width=280):
                    runs = gr.Dropdown(
                        [],
                        multiselect=True,
                        label="Runs",
                        info="Finished runs of one base. The first column is always the base without a LoRA.",
                    )
                    prompts = gr.Textbox(label="Prompts", info="One prompt per line.", lines=4, max_lines=8)
                with gr.Column(scale=2, min_width=280):
                    rows = gr.Radio(_ROWS, value=BY_PROMPT, label="Rows", info=_ROWS_INFO)
                    with gr.Column() as one_strength:
                        strength = gr.Slider(
                            *STRENGTHS,
                            1,
                            step=0.05,
                            label="LoRA strength",
                            info="0 is the base, 1 is as it was trained.",
                        )
                    strengths = gr.Textbox("0.5, 1, 1.5", label="LoRA strengths", info="From 0 to 1.5.", visible=False)
                    seeds = gr.Textbox("0", label="Seeds", info="One picture for each seed.")
            with gr.Accordion("More settings", open=False), gr.Row():
                steps = gr.Slider(
                    *STEPS, 25, step=1, label="Steps", info="More is finer and slower; FLUX.2 klein: 50, distilled 4."
                )
                guidance = gr.Slider(
                    *GUIDANCES,
                    5,
                    step=0.5,
                    label="Guidance",
                    info="How closely the prompt is followed; FLUX.2 klein: 4.",
                )
                precision = gr.Dropdown(
                    _PRECISIONS,
                    value=AUTOMATIC,
                    label="Precision",
                    info="Default: fp16 on a GPU (FLUX.2 klein: bf16), fp32 on a CPU.",
                )
                goes_first = gr.Checkbox(
                    False,
                    label="Do not wait",
                    info="Pauses a running training, which is resumed afterwards.",
                    visible=not view.context.settings.read_only,
                )
        with gr.Column(scale=5, min_width=800):
            with gr.Row():
                draw_button = gr.Button("Draw", variant="primary", min_width=120, elem_id="fl-draw")
                stop = gr.Button("Stop drawing", visible=False, min_width=120)
                picture = gr.DownloadButton("Save as PNG", interactive=False, min_width=120)
                page = gr.DownloadButton("Save as HTML", interactive=False, min_width=120)
            with gr.Row():
                look = gr.Radio(
                    _LOOKS,
                    value=PICTURES,
                    label="Show",
                    info="Differences are amplified four times; black means equal.",
                    scale=3,
                )
                size = gr.Slider(
                    64,
                    640,
                    320,
                    step=16,
                    label="Size",
                    info="of each picture here, in pixels",
                    scale=2,
                    min_width=220,
                )
            size.input(None, [size], None, js=_RESIZE)
            status = gr.HTML("", css_template=STATUS_CSS, elem_id="fl-compare-status", padding=False)
            grid = gr.HTML(
                WHILE_LOADING, css_template=GRID_CSS, js_on_load=GRID_SCRIPT, elem_id="fl-compare-grid", padding=False
            )
    form: list[gr.components.Component] = [
        runs, prompts, seeds, rows, strength, strengths, steps, guidance, look, precision,
    ]  # fmt: skip
    kept = {str(part.label): part for part in (prompts, seeds, rows, strength, strengths, steps, guidance)}
    restored = remember_fields(load, "compare", kept, event="input")
    outputs = [grid, status, picture, page, stop, last]
    # The form checks its values itself, in a sentence beside it: for one that Gradio refuses no handler is called, and
    # what is drawn would come no more. It would refuse choices that are filled in per page, too.
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}

    def on_draw(request: gr.Request, goes_first: bool, *values: Any) -> tuple[Any, ...]:
        return draw(view, goes_first, *values, session=request.session_hash or "")

    def on_stop(last: Shown | None, *values: Any) -> tuple[Any, ...]:
        view.stop(Form(*values))
        return refresh(view, last, *values)

    rows.change(_show_strengths, rows, [one_strength, strengths], **quiet)
    draw_button.click(on_draw, [goes_first, *form], outputs, api_name="compare_draw", preprocess=False)
    if not view.context.settings.read_only:
        stop.click(on_stop, [last, *form], outputs, **quiet)

    def on_tick(known: list[str] | None, last: Shown | None, *values: Any) -> tuple[Any, ...]:
        return *choices(view, known, values[0], values[1]), *refresh(view, last, *values)

    restored.then(partial(choices, view), [known, runs, prompts], [runs, prompts, seeds, known], **quiet)
    # A dropdown for many fires `change` without end once its choices were filled in; `input` is the user's own.
    changed = [known.change, runs.input, *(one.change for one in form if one is not runs)]
    gr.on(changed, partial(refresh, view), [last, *form], outputs, **quiet)
    timer = gr.Timer(_POLL_SECONDS, active=False)
    looked = {"inputs": [known, last, *form], "outputs": [runs, prompts, seeds, known, *outputs], **quiet}
    timer.tick(**skip_unchanged({"fn": on_tick, **looked}, partial(fingerprint_of, view.context)))
    return form, timer, known


def _show_strengths(rows: str) -> tuple[Any, Any]:
    is_several = rows == BY_STRENGTH
    return gr.update(visible=not is_several), gr.update(visible=is_several)
