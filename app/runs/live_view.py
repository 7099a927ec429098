"""Runs as HTML, curves and pictures, made of what is in their folders."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from flatlora_diffusion.config import METHOD_NAMES

from ..context import AppContext
from ..theme import COLOURS, SHADES
from .runs import Run

_MOST_POINTS = 300
_LAST_LINES = 12
LOG_LINES = 40
_LOG_LINES_READ = 400  # so that enough is left when the noise is out
# What packages print while they are imported; nobody can act on it, and it hides the training's own lines.
_NOISE = re.compile(
    r"Failed to load .*(kernels-community|torchao)"
    r"|Unable to import `torchao`"
    r"|Warning: Detected no triton"
    r"|[WI]\d{4} \d\d:\d\d:\d\d\.\d+ .*(site|dist)-packages"
    r"|(?!  File ).*(site|dist)-packages.*: \w*Warning: "
    r"|Loading (pipeline components|weights|checkpoint shards)\b.*\d+%"
)
_STATES = {
    "queued": "waiting for its turn",
    "running": "training",
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped",
    "interrupted": "interrupted",
}
NOTHING = (
    '<div class="fl-card"><b>Nothing has been trained here yet.</b><br>'
    "Load images in the Dataset tab, choose a preset, press Start; progress and previews then show here.</div>"
)


def method_name(method: str | None) -> str:
    """As people say it."""
    return METHOD_NAMES.get(method or "", method or "")


def recent_runs(context: AppContext) -> list[Run]:
    """The runs that train or wait and, at the least, the newest with its partner, in the order of the queue."""
    jobs = [job for job in context.queue.jobs() if job.run is not None and job.state != "cancelled"]
    active = [job for job in jobs if job.state in ("running", "queued")]
    focus = active or jobs[-1:]
    pairs = {job.pair for job in focus if job.pair}
    wanted = dict.fromkeys(job.run for job in jobs if job in focus or job.pair in pairs)
    known = {run.id: run for run in context.runs.all()}
    return [known[run_id] for run_id in wanted if run_id in known]


def run_card(run: Run) -> str:
    """Progress of one run; of a failed one its sentence and last lines."""
    progress = run.progress
    facts = [f"step {progress.step}" + (f" of {progress.total}" if progress.total else "")]
    if progress.seconds_per_step is not None:
        facts.append(f"{progress.seconds_per_step:.2f} s/step")
    if run.state == "running" and progress.eta_seconds is not None:
        facts.append(f"{duration(progress.eta_seconds)} left")
    colour = COLOURS.get(method_name(run.method), "#777")
    card = (
        f'<div class="fl-card" data-state="{run.state}"><div class="fl-head">'
        f"<b>{html.escape(run.name)}</b><span>{_STATES[run.state]}</span></div>"
        f'<div class="fl-track" role="progressbar" aria-valuenow="{round(100 * progress.fraction)}" aria-valuemin="0"'
        f' aria-valuemax="100"><div class="fl-fill" style="width:{100 * progress.fraction:.1f}%;background:{colour}">'
        f'</div></div><span class="fl-faint">{" · ".join(facts)}</span>'
    )
    if run.advice:
        tone = "fl-bad" if run.state in ("failed", "interrupted") else "fl-faint"
        card += f'<p class="{tone}">{html.escape(run.advice)}</p>'
    log = own_lines(run.log)[-_LAST_LINES:]
    if log:
        card += f"<pre>{html.escape(chr(10).join(log))}</pre>"
    return card + "</div>"


def log_tail(context: AppContext, run_id: str) -> str:
    """The last LOG_LINES lines that the training itself has printed."""
    return "\n".join(own_lines(context.runs.log(run_id, _LOG_LINES_READ))[-LOG_LINES:])


def own_lines(lines: Sequence[str]) -> list[str]:
    """The lines without what packages print while they are imported, and without the source line of a warning."""
    kept = []
    was_noise = False
    for line in lines:
        is_source = was_noise and line.startswith("  ")
        was_noise = _NOISE.match(line) is not None
        if not (was_noise or is_source):
            kept.append(line)
    return kept


def loss_curves(context: AppContext, runs: list[Run]) -> gr.LinePlot:
    """The chart of the runs that have a loss, each in its method's colour; hidden while there is none."""
    frame = loss_frame(context, runs)
    return gr.LinePlot(value=frame, color_map=run_colours(runs), visible=len(frame) > 0)


def run_colours(runs: list[Run]) -> dict[str, str]:
    """The colour of each run by its name: that of its method, in another shade for a second run of the method."""
    colours: dict[str, str] = {}
    for run in runs:
        shades = SHADES.get(method_name(run.method), ("#777777",))
        free = [shade for shade in shades if shade not in colours.values()]
        colours.setdefault(run.name, (free or shades)[0])
    return colours


def loss_frame(context: AppContext, runs: list[Run]) -> pd.DataFrame:
    """Columns step, loss (mean over a tenth of the run), raw, run."""
    frames = []
    for run in runs:
        points = context.runs.losses(run.id)
        frame = pd.DataFrame(points, columns=["step", "raw"])
        window = max(1, len(frame) // 10)
        frame["loss"] = frame["raw"].rolling(window, center=True, min_periods=1).mean()
        frame["run"] = run.name
        frames.append(frame.iloc[:: max(1, len(frame) // _MOST_POINTS)])
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled) if filled else pd.DataFrame({"step": [], "raw": [], "loss": [], "run": []})


def newest_previews(context: AppContext, runs: list[Run]) -> list[tuple[str, str]]:
    """(file, caption) of each run's last previews."""
    shown = []
    for run in runs:
        images = [(step, path) for step, path in context.runs.images(run.id) if Path(path).is_file()]
        last = max((step for step, _ in images), default=0)
        shown += [(str(path), f"{run.name}, step {step}") for step, path in images if step == last]
    return shown


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def live(context: AppContext, chosen: str | None, seen: tuple[str, str] | None) -> tuple[Any, ...]:
    """Cards, run choice, curves, what stands for none, previews, log, the three buttons, what was shown.

    Unchanged parts are left alone.
    """
    runs = recent_runs(context)
    ids = [run.id for run in runs]
    at_work = next((run.id for run in runs if run.state == "running"), ids[-1] if ids else None)
    chosen = chosen if chosen in ids else at_work
    run = next((run for run in runs if run.id == chosen), None)
    images = newest_previews(context, runs)
    drawn = f"{chosen} {[(one.id, one.progress.step, one.state, one.is_resumable) for one in runs]} {images}"
    log = log_tail(context, chosen) if chosen else ""
    seen_drawn, seen_log = seen or (None, None)
    is_same = drawn == seen_drawn
    choices = [(one.name, one.id) for one in runs]
    has_loss = any(one.progress.step for one in runs)
    return (
        "".join(map(run_card, runs)) or NOTHING,
        gr.skip() if is_same else gr.Radio(choices=choices, value=chosen, visible=len(choices) > 1),
        gr.skip() if is_same else loss_curves(context, runs),
        gr.skip() if is_same else gr.HTML(visible=bool(runs) and not has_loss),
        gr.skip() if is_same else gr.Gallery(value=images, visible=bool(images)),
        gr.skip() if log == seen_log else gr.Textbox(value=log, visible=bool(log)),
        *([gr.skip()] * 3 if is_same else _buttons(run)),
        (drawn, log),
    )


def _buttons(run: Run | None) -> list[Any]:
    """Stop, Save now, Resume."""
    if run is None:
        return [gr.Button(interactive=False)] * 3
    is_training = run.state == "running"
    can = (is_training or run.state == "queued", is_training and run.progress.step > 0, run.is_resumable)
    return [gr.Button(interactive=one) for one in can]
