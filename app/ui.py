"""The page: its tabs, nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gradio as gr

from .compare.tab import build_compare_tab
from .context import AppContext
from .dataset.tab import build_dataset_tab
from .flatness.tab import build_flatness_tab
from .forms.forms import ConfigForm
from .runs_tab.tab import CloneTarget, build_runs_tab
from .train.tab import build_train_tab
from .widgets.browser_memory import remember_tab
from .widgets.messages import Page

_HOUR = 3600  # seconds; Gradio's copies of uploads are looked through each hour, and go after a day
_TITLE = (
    "# flatlora-diffusion\nTeach SDXL or FLUX.2 klein your style with LoRA and Flat-LoRA, and see which one you like "
    "better."
)
_READ_ONLY_TITLE = (
    "# flatlora-diffusion\nDraw with LoRAs of one style side by side, and vote without knowing which is which. "
    "Nothing is trained on this page."
)


def build_app(context: AppContext) -> gr.Blocks:
    """The page of `context`, not launched yet."""
    with Page(title="flatlora-diffusion", analytics_enabled=False, delete_cache=(_HOUR, 24 * _HOUR)) as page:
        # Outside of the tabs: what is in a tab that was not opened yet is not there, and keeps nothing.
        voter = gr.BrowserState("", storage_key="flatlora-voter", secret="browser only")
        if context.settings.read_only:
            _build_read_only(context, voter, page.load)
        else:
            _build_all(context, voter, page.load)
    _keep_unnamed_private(page)
    return page


def _build_all(context: AppContext, voter: gr.BrowserState, load: Callable[..., Any]) -> None:
    session = gr.BrowserState("", storage_key="flatlora-session", secret="browser only")
    form = ConfigForm()
    gr.Markdown(_TITLE, elem_classes="fl-title")
    with gr.Tabs() as tabs:
        with gr.Tab("1 Dataset", id="dataset", elem_id="fl-tab-dataset") as dataset:
            dataset_tab = build_dataset_tab(context, form, session, load)
        with gr.Tab("2 Train", id="train", elem_id="fl-tab-train") as train:
            train_tab = build_train_tab(context, form, session, load, train.select)
        with gr.Tab("3 Compare", id="compare", elem_id="fl-tab-compare") as compare:
            compare_tab = build_compare_tab(context, voter, load, tabs)
        with gr.Tab("4 Flatness", id="flatness", elem_id="fl-tab-flatness") as flatness:
            flatness_timer = build_flatness_tab(context, load)
        with gr.Tab("Runs", id="runs", elem_id="fl-tab-runs") as runs:
            build_runs_tab(context, runs.select, CloneTarget(form, session, tabs, train_tab, dataset_tab.look))
    # Before the tab is opened, which would show for seconds what was missing before.
    gr.on(dataset_tab.changed, trigger_mode="always_last", **train_tab.summary)
    timers = {"train": train_tab.timer, "compare": compare_tab.timer, "flatness": flatness_timer}
    named = {"dataset": dataset, "train": train, "compare": compare, "flatness": flatness, "runs": runs}
    train_tab.compare.click(**compare_tab.to_trained)
    # In the browser: answers of the server can overtake others, and hidden timers would keep the browser busy.
    remember_tab(load, tabs, named, timers)


def _build_read_only(context: AppContext, voter: gr.BrowserState, load: Callable[..., Any]) -> None:
    """Without the tabs that train, measure or take images: Gradio answers to no event that is not built."""
    gr.Markdown(_READ_ONLY_TITLE, elem_classes="fl-title")
    with gr.Tabs() as tabs:
        with gr.Tab("Compare", id="compare", elem_id="fl-tab-compare") as compare:
            compare_tab = build_compare_tab(context, voter, load, tabs)
        with gr.Tab("Runs", id="runs", elem_id="fl-tab-runs") as runs:
            build_runs_tab(context, runs.select, None)
    remember_tab(load, tabs, {"compare": compare, "runs": runs}, {"compare": compare_tab.timer})


def _keep_unnamed_private(page: gr.Blocks) -> None:
    """Hide unnamed events from the API: Gradio makes an endpoint of every event."""
    for event in page.fns.values():
        if re.fullmatch(r"(partial|lambda|_?picked)(_\d+)?", str(event.api_name)):
            event.api_visibility = "private"
