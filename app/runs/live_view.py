"""Runs as HTML, curves and pictures, made of what is in their folders."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

import gradio as gr

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..jobs.store import Job
from ..loss_chart import loss_chart
from ..sample_strip import strips
from ..theme import NO_METHOD, SHADES
from .phase import STOPPING
from .run_cards import CANCEL, EARLIER, RESUME, SAVE, STOP, method_name, own_lines, run_card, waiting_card
from .runs import Run

_MOST_POINTS = 300
LOG_LINES = 40
_LOG_LINES_READ = 400  # so that enough is left when the noise is out
_WORK = {"generate": "Drawing pictures", "flatness": "Measuring flatness"}
_LOSS_TEXT = "How far the LoRA is off: it should fall, then level out."
_PAIR_TEXT = "Both of a pair see the same images and noise, so their curves may lie on each other."
NOTHING = (
    '<div class="fl-card"><b>Nothing has been trained here yet.</b><br>'
    "Load images in the Dataset tab, choose a preset, press Start; progress and previews then show here.</div>"
)


def recent_runs(context: AppContext) -> list[Run]:
    """Those of `recent_ids`, without what was deleted since."""
    found = []
    for run_id in recent_ids(context):
        with suppress(ConfigError):
            found.append(context.runs.get(run_id))
    return found


def recent_ids(context: AppContext) -> list[str]:
    """The runs that train or wait and, at the least, the newest with its partner, in the order of the queue."""
    jobs = [job for job in context.queue.jobs() if job.run is not None and job.state != "cancelled"]
    active = [job for job in jobs if job.state in ("running", "queued")]
    focus = active or jobs[-1:]
    pairs = {job.pair for job in focus if job.pair}
    wanted = dict.fromkeys(job.run for job in jobs if job in focus or job.pair in pairs)
    return list(filter(None, wanted))


def log_tail(context: AppContext, run_id: str) -> str:
    """The last LOG_LINES lines that the training itself has printed."""
    return "\n".join(own_lines(context.runs.log(run_id, _LOG_LINES_READ))[-LOG_LINES:])


def loss_curves(context: AppContext, runs: list[Run]) -> gr.HTML:
    """The chart of the runs that have a loss, each in its method's colour; hidden while there is none."""
    curves = {run.name: [(step + 1, loss) for step, loss in smoothed(context.runs.losses(run.id))] for run in runs}
    text = f"{_LOSS_TEXT} {_PAIR_TEXT}" if len(runs) > 1 else _LOSS_TEXT
    chart = loss_chart(curves, run_colours(runs), "Loss, smoothed", text)
    return gr.HTML(chart, visible=bool(chart))


def run_colours(runs: list[Run]) -> dict[str, str]:
    """The colour of each run by its name: that of its method, in another shade for a second run of the method."""
    colours: dict[str, str] = {}
    for run in runs:
        shades = SHADES.get(method_name(run.method), (NO_METHOD,))
        free = [shade for shade in shades if shade not in colours.values()]
        colours.setdefault(run.name, (free or shades)[0])
    return colours


def smoothed(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """(step, mean loss over a tenth of the run around it), of _MOST_POINTS steps at the most."""
    reach = max(1, len(losses) // 10) // 2
    sums = [0.0, *accumulate(loss for _, loss in losses)]
    every = -(-len(losses) // _MOST_POINTS) or 1
    means = []
    for place in range(0, len(losses), every):
        first, last = max(0, place - reach), min(len(losses), place + reach + 1)
        means.append((losses[place][0], (sums[last] - sums[first]) / (last - first)))
    return means


def samples(context: AppContext, runs: list[Run]) -> gr.HTML:
    """The previews of the runs over their steps; hidden while there are none."""
    page = strips(context, runs, run_colours(runs))
    return gr.HTML(page, visible=bool(page))


def live(context: AppContext, chosen: str | None, seen: tuple[str, ...] | None) -> tuple[Any, ...]:
    """Cards, choice of the log, curves, what stands for none, samples, log, the way on to the comparison, the button
    that cancels all that waits, what was shown. Unchanged parts are left alone.

    The log is that of the run at work; one that was chosen by hand stays until another run begins.
    """
    runs = recent_runs(context)
    ids = [run.id for run in runs]
    seen_drawn, seen_sampled, seen_log, seen_cards, was_at_work = seen or [None] * 5
    at_work = run_at_work(runs)
    chosen = chosen if chosen in ids and at_work == was_at_work else at_work
    drawn = f"{chosen} {[(one.id, one.name, one.progress.step, one.state) for one in runs]}"
    sampled = f"{[(one.id, one.name, context.runs.previews(one.id)) for one in runs]}"
    log = log_tail(context, chosen) if chosen else ""
    waiting = context.queue.jobs("queued")
    cards = live_cards(runs, waiting) or NOTHING
    is_same = drawn == seen_drawn
    choices = [(one.name, one.id) for one in runs]
    has_loss = any(one.progress.step for one in runs)
    return (
        gr.skip() if cards == seen_cards else cards,
        gr.skip() if is_same else gr.Radio(choices=choices, value=chosen, visible=len(choices) > 1),
        gr.skip() if is_same else loss_curves(context, runs),
        gr.skip() if is_same else gr.HTML(visible=bool(runs) and not has_loss),
        gr.skip() if sampled == seen_sampled else samples(context, runs),
        gr.skip() if log == seen_log else gr.Textbox(value=log, visible=bool(log)),
        gr.skip() if is_same else way_on(runs),
        gr.skip() if cards == seen_cards else gr.Button(visible=len(waiting) > 1),
        (drawn, sampled, log, cards, at_work),
    )


def run_at_work(runs: Sequence[Run]) -> str | None:
    """The id of the run that trains, else of the last that has begun, else of the first that waits."""
    running = [run.id for run in runs if run.state == "running"]
    begun = [run.id for run in runs if run.state != "queued"]
    return next(iter((*running, *begun[-1:], *(run.id for run in runs))), None)


def way_on(runs: Sequence[Run]) -> gr.Button:
    """The button to the Compare tab, for runs of which all have ended and one or more can be compared."""
    finished = [run.name for run in runs if run.state == "finished"]
    is_over = bool(finished) and not any(run.state in ("running", "queued") for run in runs)
    what = " and ".join(finished) if len(finished) > 1 else f"{''.join(finished)} with the base"
    return gr.Button(f"Next: compare {what}", visible=is_over)


def live_cards(runs: Sequence[Run], waiting: Sequence[Job]) -> str:
    """The cards of the runs, then those of other work that waits, each with what may be done about it."""
    places = {job.run: place for place, job in enumerate(waiting) if job.run is not None}
    cards = [run_card(run, acts_of(run, places.get(run.id))) for run in runs]
    for place, job in enumerate(waiting):
        if job.run is None:
            cards.append(waiting_card(f"{_WORK[job.kind]}, waiting", _waiting_acts(place), f"job {job.id}"))
    return "".join(cards)


def acts_of(run: Run, place: int | None) -> list[str]:
    """What may be done about a run; `place`: in the queue, None for one that does not wait."""
    if run.state == "running":
        is_stopping = run.phase == STOPPING
        return [] if is_stopping else [STOP, SAVE] if run.progress.step else [STOP]
    if place is not None:
        return _waiting_acts(place)
    return [RESUME] if run.is_resumable else []


def _waiting_acts(place: int) -> list[str]:
    return [EARLIER, CANCEL] if place else [CANCEL]
