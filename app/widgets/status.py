"""Status lines of jobs: waiting, failure, and errors."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..context import AppContext
from ..process.database import Job
from ..runs.state import logged_error
from .html import read_static

STATUS_CSS = read_static("status.css")


def status_line(text: str, done: float | None = None) -> str:
    """A status line, with a progress bar if the fraction `done` is known."""
    bar = "" if done is None else f'<progress aria-label="Progress" value="{done:.3f}" max="1"></progress>'
    return f'<div class="fl-status" role="status">{escape(text)}{bar}</div>'


def error_line(text: str, log: Sequence[str] = ()) -> str:
    """An error, with the end of the log to unfold. The text is shown unchanged, as it may begin with a file name."""
    lines = escape("\n".join(log))
    more = f"<details><summary>Last lines of the log</summary><pre>{lines}</pre></details>" if log else ""
    return f'<div class="fl-status fl-wrong" role="alert">{escape(text)}{more}</div>'


def why_waiting(context: AppContext, job: Job) -> str:
    """The reason why a job waits."""
    before = [one for one in context.queue.jobs("running", "queued") if one.position < job.position]
    trainings = [context.runs.get(one.run).name for one in before if one.run is not None]
    if trainings:
        return f"Waiting for the training {trainings[0]}; one job runs at a time."
    return "Waiting for another job; one runs at a time." if before else "Starting ..."


def why_failed(context: AppContext, job: Job) -> tuple[str, list[str]]:
    """(reason of the failure, end of the log)."""
    log = context.queue.launch_of(job.id).log() if job.launch else []
    return logged_error(log) or job.error or f"it ended with exit code {job.exit_code}", log
