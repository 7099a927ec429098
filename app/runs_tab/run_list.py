"""All runs as a list to look through: picture, name, method, base, score, date and size; searched, sorted, grouped."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from ..context import AppContext
from ..runs.names import IMPORTED
from ..runs.reports import arm_picture
from ..runs.runs import Run
from ..widgets.html import empty_page, file_url, read_static
from ..widgets.run_cards import base_name, method_name
from ..widgets.theme import COLOURS, NO_METHOD

NEWEST, BY_NAME, BY_SCORE, BY_SIZE, GROUPED = "Newest first", "By name", "Best score first", "Largest first", "Grouped"
ORDERS = (NEWEST, BY_NAME, BY_SCORE, BY_SIZE, GROUPED)
NO_RUNS = empty_page("No runs yet", "Runs from the Train tab and imported LoRAs are listed here.")
NONE_FOUND = empty_page("No run has these words", "Name, state, method, base and tags are searched; use fewer words.")
_ARM_AND_SEED = re.compile(r"/[^/]+/seed-\d+$|[-/](flat-lora|lora|base)(-\d+)?$")
RUNS_CSS = read_static("empty.css", "run_list.css")
RUNS_SCRIPT = read_static("run_list.js")


@dataclass(frozen=True)
class RunRow:
    """One run of the list.

    Attributes:
        score: a loss, lower is better.
        scored: the kind of loss.
        size: bytes on disk.
    """

    id: str
    name: str
    state: str
    method: str
    base: str
    steps: str
    score: float | None
    scored: str
    size: int
    tags: tuple[str, ...]
    changed: float
    picture: Path | None

    @property
    def experiment(self) -> str:
        """The id without arm and seed, equal for all runs of an experiment."""
        return _ARM_AND_SEED.sub("", self.id)

    @property
    def words(self) -> str:
        """The searched text."""
        return " ".join((self.name, self.id, self.state, self.method, self.base, *self.tags)).lower()


def rows_of(context: AppContext) -> list[RunRow]:
    """A row for each run, newest first."""
    rows = [(run, context.runs.cached(run, "row", partial(_row, context, run))) for run in context.runs.all()]
    # A report with the pictures of an arm is written after the last word of its run.
    return [
        replace(row, name=run.name, tags=run.label.tags, picture=row.picture or arm_picture(context.runs, run.id))
        for run, row in rows
    ]


def filter_and_sort(rows: Sequence[RunRow], words: str, order: str) -> list[RunRow]:
    """The rows that contain all `words`, in this order; rows without a score last."""
    found = [row for row in rows if all(word in row.words for word in words.lower().split())]
    keys: dict[str, Callable[[RunRow], Any]] = {
        BY_NAME: lambda row: row.name.lower(),
        BY_SCORE: lambda row: (row.score is None, row.score or 0.0),
        BY_SIZE: lambda row: -row.size,
        GROUPED: lambda row: (row.experiment, row.id),
    }
    return sorted(found, key=keys[order]) if order in keys else found


def list_page(rows: Sequence[RunRow], order: str, chosen: str | None, is_searched: bool) -> str:
    """The list as HTML, each row a button that chooses its run."""
    if not rows:
        return NONE_FOUND if is_searched else NO_RUNS
    lines, experiment = [], None
    for row in rows:
        if order == GROUPED and row.experiment != experiment:
            experiment = row.experiment
            lines.append(f"<li><h3>{escape(experiment)}</h3></li>")
        lines.append(f"<li>{_line(row, row.id == chosen)}</li>")
    return f'<ul class="fl-runs">{"".join(lines)}</ul>'


def storage_line(context: AppContext, rows: Sequence[RunRow]) -> str:
    """The disk space of the runs and the trash."""
    trash = context.runs.trash.size()
    return f"{len(rows)} runs take {mebibytes(sum(row.size for row in rows))}, the trash {mebibytes(trash)}."


def mebibytes(count: int) -> str:
    """`12.3 MiB`, `1.2 GiB`."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def _row(context: AppContext, run: Run) -> RunRow:
    score, scored = _score(context, run.id)
    images = [one.path for one in context.runs.events(run.id).previews() if one.path.is_file()]
    base = context.runs.settings(run.id).get("pretrained_model_name_or_path") or ""
    is_imported = run.method == IMPORTED
    return RunRow(
        id=run.id,
        name=run.name,
        state=run.phase or run.state,
        method=method_name(run.method),
        base=base_name(str(base)),
        steps="" if is_imported else f"{run.progress.step} of {run.progress.total or '?'} steps",
        score=score,
        scored=scored,
        size=context.runs.size(run.id),
        tags=run.label.tags,
        changed=run.changed,
        picture=images[-1] if images else None,
    )


def _score(context: AppContext, run_id: str) -> tuple[float | None, str]:
    """(loss, where): on images not trained on if it was measured, else in the last tenth of the steps."""
    unseen = context.runs.events(run_id).validation_losses()
    if unseen:
        return unseen[-1][1], "on unseen images"
    losses = [loss for _, loss in context.runs.events(run_id).losses()]
    last = losses[-max(1, len(losses) // 10) :]
    return (sum(last) / len(last), "in training") if last else (None, "")


def _line(row: RunRow, is_chosen: bool) -> str:
    picture = '<span class="fl-none"></span>'
    if row.picture is not None:
        picture = f'<img src="{file_url(row.picture)}" alt="" loading="lazy">'
    dot = f'<i style="background:{COLOURS.get(row.method, NO_METHOD)}"></i>'
    score = "" if row.score is None else f"loss {row.score:.4f} {row.scored}"
    when = datetime.fromtimestamp(row.changed).strftime("%d %b %Y, %H:%M") if row.changed else ""
    below = " · ".join(filter(None, (*row.tags, row.id if row.id != row.name else "")))
    facts = "".join(f"<span>{escape(fact)}</span>" for fact in (row.base, row.steps, score, when) if fact)
    return (
        f'<button type="button" class="fl-run" data-run="{escape(row.id)}" aria-pressed="{str(is_chosen).lower()}">'
        f"{picture}<b>{escape(row.name)}<small>{escape(below)}</small></b><span>{dot}{escape(row.method)}</span>"
        f"<span>{escape(row.state)}</span>{facts}<span>{mebibytes(row.size)}</span></button>"
    )
