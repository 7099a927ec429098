"""The handlers of the side-by-side comparison: plain functions from the form's values to the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatlora_diffusion.config import ConfigError, ModelConfig
from flatlora_diffusion.families.registry import drawing_precision

from ..context import AppContext
from ..errors import describe_error
from ..process.database import Job
from ..widgets.html import empty_page
from ..widgets.messages import answer_card
from ..widgets.status import error_line, status_line, why_failed, why_waiting
from .answer import answer
from .comparison import (
    ComparedRun,
    Comparison,
    common_moments,
    default_prompts,
    finished_arms,
    newest_pair,
    read_prompts,
    read_seeds,
    read_strengths,
)
from .export import save_grid, save_page
from .grid import grid_page
from .picture_cache import PRECISIONS, DrawOrder, Picture, PictureCache, orders_for

BY_PROMPT, BY_STRENGTH, BY_CHECKPOINT = "prompts", "strengths", "checkpoints"
PICTURES, TO_BASE, BETWEEN = "pictures", "to_base", "between"
_REFERENCES = {TO_BASE: 0, BETWEEN: 1}  # the column that the later ones are shown as differences to
AUTOMATIC = "automatic"
STRENGTHS, STEPS, GUIDANCES = (0.0, 1.5), (1, 100), (0.0, 15.0)  # from and to
NO_RUNS = "Nothing to compare yet"
# Of a read-only app, whose visitors nobody knows: a few minutes on two CPU cores for the tiny base.
MAX_OPEN_STEPS = 4000  # denoising steps of all pictures that are not drawn yet
MAX_LETTERS = 2000  # of the prompts
WHAT_TO_DO = "Train a pair first on the Train tab; it shows up here when it has finished."


@dataclass(frozen=True)
class Form:
    """The form's values as the page sends them: unchecked, with None for an empty field."""

    runs: Sequence[str] | None
    prompts: str | None
    seeds: str | None
    rows: str
    strength: float | None
    strengths: str | None
    steps: int | None
    guidance: float | None
    look: str = PICTURES
    precision: str = AUTOMATIC


@dataclass(frozen=True)
class Shown:
    """The outputs on the page.

    Attributes:
        picture: the exported file of a complete grid, as is `page`.
        can_stop: whether the page offers to stop the drawing.
    """

    grid: str
    status: str
    picture: Path | None = None
    page: Path | None = None
    can_stop: bool = False


class CompareView:
    """The comparison of one app: its runs, queue and picture cache."""

    def __init__(self, context: AppContext) -> None:
        self.context = context
        self.cache = PictureCache(context.queue)

    def arms(self) -> list[ComparedRun]:
        return finished_arms(self.context)

    def start(self) -> tuple[list[ComparedRun], list[str], str]:
        """(available runs, initially chosen ids, initial prompts)."""
        arms = self.arms()
        chosen = newest_pair(self.context, arms)
        return arms, chosen, default_prompts(self.context, [arm for arm in arms if arm.id in chosen])

    def comparison(self, form: Form) -> Comparison:
        """The comparison that the form describes. Raises ConfigError for wrong values."""
        arms = {arm.id: arm for arm in self.arms()}
        runs = form.runs or ()
        gone = [run for run in runs if run not in arms]
        if gone:
            raise ConfigError(f"the run {gone[0]!r} is not there any more; choose another")
        strength = _within("LoRA strength", form.strength, STRENGTHS)
        by_strength = form.rows == BY_STRENGTH
        chosen = tuple(arms[run] for run in runs)
        return Comparison(
            arms=chosen,
            prompts=read_prompts(form.prompts or ""),
            seeds=read_seeds(form.seeds or ""),
            strengths=read_strengths(form.strengths or "") if by_strength else (strength,),
            steps=int(_within("Steps", form.steps, STEPS)),
            guidance=_within("Guidance", form.guidance, GUIDANCES),
            precision=form.precision if form.precision in PRECISIONS else _default_precision(chosen),
            moments=common_moments(chosen) if chosen and form.rows == BY_CHECKPOINT else (None,),
        )

    def draw(self, form: Form, session: str, goes_first: bool = False) -> list[Job]:
        """Queue the pictures that are neither drawn nor queued, and return the new jobs.

        With `goes_first`, a running training is paused for these jobs and for waiting jobs of the comparison; in a
        read-only app all wait for their turn.

        Raises ConfigError for wrong values, and in a read-only app for more than MAX_OPEN_STEPS.
        """
        comparison = self.comparison(form)
        wanted = comparison.pictures()
        drawn = self.cache.find(wanted)
        open_jobs = self._open_jobs(wanted)
        coming = {one for job in open_jobs for one in self.cache.pictures_of(job)}
        missing = [one for one in wanted if one not in drawn and one not in coming]
        if self.context.settings.read_only:
            self._check_room(comparison, len(missing))
            goes_first = False
        orders = orders_for(missing, comparison.drawing, comparison.files)
        commands = [(order.arguments(), order.about) for order in orders]
        queue = self.context.queue
        waiting = [job for job in open_jobs if job.state == "queued"]
        jobs = [queue.add_command("generate", command, session, about) for command, about in commands]
        for job in reversed([*waiting, *jobs]) if goes_first else ():
            queue.preempt(job.id)
        return jobs

    def stop(self, form: Form) -> None:
        """Take the jobs of this comparison out of the queue."""
        for job in self._open_jobs(self.comparison(form).pictures()):
            self.context.queue.stop(job.id)

    def show(self, form: Form) -> Shown:
        """The comparison with the pictures that exist, and the progress of the jobs for the rest."""
        if not self.arms():
            return Shown(empty_page(NO_RUNS, WHAT_TO_DO), "")
        try:
            comparison = self.comparison(form)
        except ConfigError as error:
            return Shown(empty_page("There is no comparison yet", "See the line above."), error_line(str(error)))
        wanted = comparison.pictures()
        drawn = self.cache.find(wanted)
        reference = _REFERENCES.get(form.look)
        grid = grid_page(comparison, drawn, reference)
        missing = [one for one in wanted if one not in drawn]
        if not missing:
            folder = self.context.runs.folder / ".results" / "grids"
            answered = answer_card(*answer(comparison, drawn)) + grid
            try:
                picture, page = (save(comparison, drawn, reference, folder) for save in (save_grid, save_page))
            except OSError as error:
                return Shown(answered, error_line(f"The files to save cannot be written: {describe_error(error)}"))
            return Shown(answered, "", picture, page)
        jobs = self._open_jobs(missing)
        if jobs:
            can_stop = not self.context.settings.read_only  # it may be the drawing of another visitor
            return Shown(grid, self._progress(jobs, len(drawn), len(wanted)), can_stop=can_stop)
        return Shown(grid, self._why_missing(missing, len(wanted)))

    def drawn(self, comparison: Comparison) -> Mapping[Picture, Path]:
        return self.cache.find(comparison.pictures())

    def _open_jobs(self, pictures: Sequence[Picture]) -> list[Job]:
        return [job for job in self.cache.jobs_for(pictures) if job.state in ("queued", "running")]

    def _check_room(self, comparison: Comparison, missing: int) -> None:
        """Raises ConfigError for a comparison that would keep the other visitors waiting for long."""
        letters = sum(map(len, comparison.prompts))
        if letters > MAX_LETTERS:
            raise ConfigError(f"the prompts have {letters} letters; {MAX_LETTERS} at most are drawn on this page")
        orders = filter(None, map(DrawOrder.of, self.context.queue.jobs("queued", "running")))
        waiting = sum(len(order.pictures()) * order.drawing.steps for order in orders)
        wanted = missing * comparison.steps
        if missing and wanted + waiting > MAX_OPEN_STEPS:
            raise ConfigError(
                f"{missing} pictures of {comparison.steps} steps are {wanted} steps, and {waiting} wait already; this "
                f"page takes {MAX_OPEN_STEPS} at a time, so choose fewer pictures or Steps, or draw in a few minutes"
            )

    def _progress(self, jobs: Sequence[Job], done: int, count: int) -> str:
        running = next((job for job in jobs if job.state == "running"), None)
        if running is None:
            text = why_waiting(self.context, jobs[0])
        elif self.context.queue.fraction(running) is None:
            text = "Loading the base model ..."
        else:
            text = "Drawing ..."
        return status_line(f"{text} {done} of {count} pictures are there.", done / count)

    def _why_missing(self, missing: Sequence[Picture], count: int) -> str:
        tried = self.cache.jobs_for(missing)
        if tried and tried[-1].state == "failed":
            reason, log = why_failed(self.context, tried[-1])
            return error_line(f"The last job failed: {reason}. Press Draw to try again.", log)
        return status_line(f"{len(missing)} of {count} pictures are not drawn yet. Press Draw.")


def _default_precision(arms: Sequence[ComparedRun]) -> str:
    """The default compute precision of `generate` for the base of `arms`; without any, fp32 (`no`)."""
    return drawing_precision(ModelConfig(arms[0].base[1])) if arms else "no"


def _within(label: str, number: float | None, bounds: tuple[float, float]) -> float:
    """Raises ConfigError for an emptied box and for a number beyond `bounds`."""
    low, high = bounds
    if number is None:
        raise ConfigError(f"{label} is empty; enter a number")
    if not low <= number <= high:
        raise ConfigError(f"{label} is {number:g}; enter a number from {low:g} to {high:g}")
    return float(number)
