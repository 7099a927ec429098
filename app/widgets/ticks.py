"""Timers that send news only: while nothing has changed, a tick opens no file and its answer is empty."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

import gradio as gr

from ..context import AppContext
from ..errors import describe_error
from ..runs.run_paths import Fingerprint


def skip_unchanged(event: Mapping[str, Any], fingerprint: Callable[[], Fingerprint | None]) -> dict[str, Any]:
    """The event of a timer, whose handler is skipped while `fingerprint` and its inputs are unchanged.

    A repeated error is shown once. Call it in the open Blocks.
    """
    seen, handler = gr.State(None), event["fn"]
    nothing = (gr.skip(),) * len(event["outputs"])

    def on_tick(before: Any, *values: Any) -> tuple[Any, ...]:
        try:
            now = fingerprint()
            if now is not None and (now, values) == before:
                return *nothing, gr.skip()
            return *handler(*values), (now, values)
        except Exception as error:
            if repr(error) != before:
                gr.Warning(escape(describe_error(error), quote=False), title="Not shown")
            return *nothing, repr(error)

    # Gradio names an endpoint's parameters by it.
    own, *_ = inspect.signature(on_tick).parameters.values()
    on_tick.__signature__ = inspect.Signature([own, *inspect.signature(handler).parameters.values()])  # type: ignore[attr-defined]
    return {**event, "fn": on_tick, "inputs": [seen, *event["inputs"]], "outputs": [*event["outputs"], seen]}


def fingerprint_of(context: AppContext, run_ids: Iterable[str] | None = None) -> Fingerprint | None:
    """The fingerprint of the queue, the labels, and all runs or each step of the runs `run_ids`.

    None, so that no tick is skipped, shortly after a change and while a job other than a training runs.
    """
    if run_ids is None and any(job.run is None for job in context.queue.jobs("running")):
        return None
    return context.runs.fingerprint(run_ids)
