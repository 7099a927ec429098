"""The report of a run's experiment: buttons to show it in the page and to download it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from flatlora_diffusion.compare.page.page import PAGE
from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..runs.reports import experiment_name, report_frame, report_of
from ..widgets.html import read_static
from ..widgets.messages import show_errors

REPORT_CSS = read_static("report.css")


@dataclass(frozen=True)
class ReportParts:
    """`row`: hidden for a run that is part of no experiment; `shown`: the name of the experiment in the frame."""

    row: gr.Row
    button: gr.Button
    file: gr.DownloadButton
    frame: gr.HTML
    shown: gr.State


def build_report() -> ReportParts:
    with gr.Row(visible=False) as row:
        button = gr.Button("Show the report", min_width=160, elem_id="show-report")
        file = gr.DownloadButton("Download the report", min_width=160)
    frame = gr.HTML("", css_template=REPORT_CSS, elem_id="report", visible=False, padding=False)
    return ReportParts(row, button, file, frame, gr.State(""))


def offer(context: AppContext, run_id: str | None, shown: str) -> tuple[Any, ...]:
    """(row, button, file, frame, shown experiment); the frame is cleared for another experiment."""
    folder = None if not run_id else report_of(context.runs, run_id)
    if folder is None:
        return gr.Row(visible=False), gr.skip(), gr.skip(), gr.HTML("", visible=False), ""
    name = experiment_name(context.runs, folder)
    is_shown = name == shown
    frame = gr.skip() if is_shown else gr.HTML("", visible=False)
    file = gr.DownloadButton(value=folder / PAGE)
    return gr.Row(visible=True), _button(name, is_shown), file, frame, name if is_shown else ""


def toggle(context: AppContext, run_id: str | None, shown: str) -> tuple[Any, ...]:
    """(button, frame, shown experiment) after showing or hiding the report."""
    with show_errors():
        folder = None if not run_id else report_of(context.runs, run_id)
        if folder is None:
            raise ConfigError("the report is not there any more")
        name = experiment_name(context.runs, folder)
        if name == shown:
            return _button(name, False), gr.HTML("", visible=False), ""
        return _button(name, True), gr.HTML(report_frame(context.runs, folder), visible=True), name


def connect_report(context: AppContext, report: ReportParts, chosen: gr.Dropdown) -> None:
    """`chosen`: the run whose experiment is meant."""
    given: dict[str, Any] = {"inputs": [chosen, report.shown], "preprocess": False, "api_visibility": "private"}
    offered = [report.row, report.button, report.file, report.frame, report.shown]
    chosen.change(partial(offer, context), outputs=offered, show_progress="hidden", **given)
    report.button.click(partial(toggle, context), outputs=[report.button, report.frame, report.shown], **given)


def _button(name: str, is_shown: bool) -> gr.Button:
    return gr.Button(f"{'Hide' if is_shown else 'Show'} the report of {name}")
