"""The live view of the Train tab: cards, curves, samples and log of the recent runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import gradio as gr

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..process.database import Job
from ..runs.runs import Run
from ..runs.state import STOPPING
from ..widgets.loss_chart import loss_curves
from ..widgets.run_cards import CANCEL, EARLIER, RESUME, SAVE, STOP, run_card, training_lines, waiting_card
from ..widgets.sample_strip import samples

LOG_LINES = 40
_LOG_LINES_READ = 400  # so that enough is left when the noise is out
_WORK = {"generate": "Drawing pictures", "flatness": "Measuring flatness"}
NOTHING = (
    '<div class="fl-card"><b>Nothing has been trained here yet.</b><br>'
    "Load images in the Dataset tab, choose a preset, press Start; progress and previews then show here.</div>"
)


def recent_runs(context: AppContext) -> list[Run]:
    """The recent runs of the queue, without deleted ones."""
    found = []
    for run_id in context.queue.recent_runs():
        with suppress(ConfigError):
            found.append(context.runs.get(run_id))
    return found


class Seen(NamedTuple):
    """The state that the page shows, to send only the parts that change."""

    drawn: str
    sampled: str
    log: str
    cards: str
    at_work: str | None


class LiveOutputs(NamedTuple):
    """One value for each component of the live view; `gr.skip()` leaves a component unchanged.

    Attributes:
        log_of: the choice of the run whose log is shown.
        no_loss: the text in place of the curves before the first step.
        compare: the button that goes on to the Compare tab.
        cancelling: the button that cancels all waiting jobs.
    """

    cards: Any
    log_of: Any
    curves: Any
    no_loss: Any
    samples: Any
    log: Any
    compare: Any
    cancelling: Any
    seen: Seen


def live(context: AppContext, chosen: str | None, seen: Seen | None) -> LiveOutputs:
    """Show the recent runs as they are now.

    The log is that of the run at work; a choice by hand holds until another run begins.
    """
    runs = recent_runs(context)
    ids = [run.id for run in runs]
    at_work = run_at_work(runs)
    chosen = chosen if chosen in ids and seen is not None and at_work == seen.at_work else at_work
    waiting = context.queue.jobs("queued")
    lines = training_lines(context.runs.log(chosen, _LOG_LINES_READ)) if chosen else []
    now = Seen(
        drawn=f"{chosen} {[(run.id, run.name, run.progress.step, run.state) for run in runs]}",
        sampled=f"{[(run.id, run.name, context.runs.events(run.id).previews()) for run in runs]}",
        log="\n".join(lines[-LOG_LINES:]),
        cards=live_cards(runs, waiting) or NOTHING,
        at_work=at_work,
    )
    has_cards, is_drawn = seen is not None and now.cards == seen.cards, seen is not None and now.drawn == seen.drawn
    has_samples, has_log = seen is not None and now.sampled == seen.sampled, seen is not None and now.log == seen.log
    choices = [(run.name, run.id) for run in runs]
    has_loss = any(run.progress.step for run in runs)
    return LiveOutputs(
        cards=gr.skip() if has_cards else now.cards,
        log_of=gr.skip() if is_drawn else gr.Radio(choices=choices, value=chosen, visible=len(choices) > 1),
        curves=gr.skip() if is_drawn else loss_curves(context, runs),
        no_loss=gr.skip() if is_drawn else gr.HTML(visible=bool(runs) and not has_loss),
        samples=gr.skip() if has_samples else samples(context, runs),
        log=gr.skip() if has_log else gr.Textbox(value=now.log, visible=bool(now.log)),
        compare=gr.skip() if is_drawn else compare_button(runs),
        cancelling=gr.skip() if has_cards else gr.Button(visible=len(waiting) > 1),
        seen=now,
    )


def run_at_work(runs: Sequence[Run]) -> str | None:
    """The id of the run that trains, else of the last that has begun, else of the first that waits."""
    running = [run.id for run in runs if run.state == "running"]
    begun = [run.id for run in runs if run.state != "queued"]
    return next(iter((*running, *begun[-1:], *(run.id for run in runs))), None)


def compare_button(runs: Sequence[Run]) -> gr.Button:
    """The button to the Compare tab; visible when all runs have ended and one can be compared."""
    finished = [run.name for run in runs if run.state == "finished"]
    is_over = bool(finished) and not any(run.state in ("running", "queued") for run in runs)
    what = " and ".join(finished) if len(finished) > 1 else f"{''.join(finished)} with the base"
    return gr.Button(f"Next: compare {what}", visible=is_over)


def live_cards(runs: Sequence[Run], waiting: Sequence[Job]) -> str:
    """Cards of the runs, then of other waiting jobs, with their buttons."""
    places = {job.run: place for place, job in enumerate(waiting) if job.run is not None}
    cards = [run_card(run, actions_for(run, places.get(run.id))) for run in runs]
    for place, job in enumerate(waiting):
        if job.run is None:
            cards.append(waiting_card(f"{_WORK[job.kind]}, waiting", _waiting_actions(place), f"job {job.id}"))
    return "".join(cards)


def actions_for(run: Run, place: int | None) -> list[str]:
    """The actions on a run. `place`: its position in the queue; None if it does not wait."""
    if run.state == "running":
        is_stopping = run.phase == STOPPING
        return [] if is_stopping else [STOP, SAVE] if run.progress.step else [STOP]
    if place is not None:
        return _waiting_actions(place)
    return [RESUME] if run.is_resumable else []


def _waiting_actions(place: int) -> list[str]:
    return [EARLIER, CANCEL] if place else [CANCEL]
