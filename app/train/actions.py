"""Actions on a run or a waiting job, from its card or from a program."""

from __future__ import annotations

from typing import Any

import gradio as gr

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from ..widgets.confirm import Confirmation
from ..widgets.messages import show_errors
from ..widgets.run_cards import CANCEL, EARLIER, RESUME, SAVE, STOP


def run_action(context: AppContext, session: str, what: str, of: str) -> None:
    """Do the action of a card's button. `of`: a run's id, or `job N` for other work."""
    with show_errors():
        if what == SAVE:
            context.runs.save_now(of)
            gr.Info("A checkpoint is saved after this step.")
        elif what == RESUME:
            context.queue.add_resume(of, session)
        elif what in (STOP, CANCEL):
            stop(context, of)
        elif what == EARLIER:
            context.queue.move_up(_job_of(context, of))


def stop(context: AppContext, of: str) -> None:
    """Stop the run after its step, or cancel the waiting job."""
    open_jobs = [job.id for job in context.queue.jobs("running", "queued") if of in (job.run, f"job {job.id}")]
    if open_jobs:
        context.queue.stop(open_jobs[0])
    else:
        context.runs.stop(of)


def connect_actions(
    context: AppContext, session: gr.BrowserState, cards: gr.HTML, cancel: Confirmation, watch: dict[str, Any]
) -> None:
    """Connect the buttons of the cards and the same actions for programs.

    Args:
        cancel: the confirmation before all waiting jobs are cancelled.
        watch: the event that redraws the cards.
    """

    def on_card(session: str, event: gr.EventData) -> None:
        run_action(context, session, str(event.act), str(event.of))

    def on_cancel() -> None:
        count = context.queue.cancel_waiting()
        gr.Info(f"{count} canceled.")

    def stop_run(run_id: str) -> None:
        run_action(context, "", STOP, run_id)

    def save_run(run_id: str) -> None:
        run_action(context, "", SAVE, run_id)

    def resume_run(session: str, run_id: str) -> None:
        run_action(context, session, RESUME, run_id)

    cards.click(on_card, [session], None, api_visibility="private").then(**watch, api_visibility="private")
    cancelled = cancel.yes.click(on_cancel, None, None, api_visibility="private")
    cancelled.then(**watch, api_visibility="private").then(**cancel.hidden)
    for name, function in (("stop", stop_run), ("save_now", save_run), ("resume", resume_run)):
        gr.api(function, api_name=name)


def _job_of(context: AppContext, of: str) -> int:
    """Raises ConfigError when it does not wait any more."""
    waiting = [job.id for job in context.queue.jobs("queued") if of in (job.run, f"job {job.id}")]
    if not waiting:
        raise ConfigError("that job does not wait any more")
    return waiting[0]
