"""The handlers of the Flatness tab: measure finished runs as a queued job, find its result again, show it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from html import escape
from pathlib import Path

from flatlora_diffusion.config import METHODS, ConfigError
from flatlora_diffusion.storage.run_dir import RunDir

from ..compare.comparison import finished_arms, newest_pair
from ..context import AppContext
from ..process.database import Job
from ..process.json_file import read_json
from ..widgets.html import empty_page, file_url
from ..widgets.messages import answer_card
from ..widgets.run_cards import duration, method_name
from ..widgets.status import error_line, status_line, why_failed, why_waiting
from .answer import answer

QUICK, THOROUGH = "quick", "thorough"
_SETTINGS = {
    QUICK: "--no_curvature --sigmas 0.05 0.1 0.2 --rise_draws 2 --radii 0.003 --slice_directions 2 --surface_points 5",
    THOROUGH: "",
}
_MEASURED = re.compile(r": measured in \d+ s$")
_LOG_LINES = 200
_RESULT = "flatness.json"
_CHARTS = (
    ("rise.png", "The lower its curve, the flatter is the loss around the weights."),
    ("slices.png", "A wide valley is flat, a narrow one is sharp."),
    ("strength.png", "How the loss answers when the LoRA is used weaker or stronger."),
    ("surface.png", "The same surface as below, seen from above."),
)
NOTHING = empty_page(
    "Nothing has been measured yet", "Choose finished runs of one base and one set of images, then press Measure."
)
NO_RUNS = empty_page(
    "There is no finished run yet", "Train a pair first on the Train tab; it can be measured when it has finished."
)


@dataclass(frozen=True)
class Result:
    """The outputs of one measurement; `charts` begins with its answer."""

    charts: str
    tables: str
    surface: Path | None


class FlatnessView:
    """The flatness measurements of one app."""

    def __init__(self, context: AppContext) -> None:
        self.context = context

    def runs(self) -> list[tuple[str, str]]:
        """(label, id) of the runs that can be measured, newest first."""
        return [
            (f"{run.name} · {method_name(run.method)}", run.id)
            for run in self.context.runs.all()
            if run.state == "finished" and run.method in METHODS
        ]

    def newest(self) -> list[str]:
        """The initial choice: the newest fair pair, else two runs on one base and dataset, else one run."""
        pair = newest_pair(self.context, finished_arms(self.context))
        if len(pair) == 2 and _alike(self.context, pair[0]) == _alike(self.context, pair[1]):
            return pair
        alike: dict[tuple[object, ...], list[str]] = {}
        for _, run_id in self.runs():
            together = alike.setdefault(_alike(self.context, run_id), [])
            together.append(run_id)
            if len(together) == 2:
                return together
        return [run_id for _, run_id in self.runs()][:1]

    def measure(self, runs: Sequence[str], effort: str, session: str) -> Job:
        """Queue the measurement. Raises ConfigError, as the command says it, for runs that do not go together."""
        from flatlora_diffusion.evaluation.finished_runs import read_runs

        folders = [str(self.context.runs.get(run_id).folder) for run_id in runs]
        if not folders:
            raise ConfigError("no run is chosen; choose one or two")
        if effort not in _SETTINGS:
            raise ConfigError(f"Effort = {effort!r} must be {QUICK} or {THOROUGH}")
        read_runs(folders)
        if self.open_job() is not None:
            raise ConfigError("a measurement runs or waits already; stop it or wait until it is done")
        settings = self.context.runs.settings(runs[0])
        places = {name: settings.get(name) for name in ("pretrained_model_name_or_path", "instance_data_dir")}
        flags = [part for name, place in places.items() if place for part in (f"--{name}", str(place))]
        names = [self.context.runs.get(run_id).name for run_id in runs]
        return self.context.queue.add_command(
            "flatness",
            ["flatness", "--runs", *folders, *flags, *_SETTINGS[effort].split()],
            session,
            about={"runs": names, "effort": effort},
        )

    def stop(self) -> None:
        """Take the measurement out of the queue, or end it."""
        job = self.open_job()
        if job is not None:
            self.context.queue.stop(job.id)

    def open_job(self) -> Job | None:
        """The measurement that runs or waits."""
        jobs = [job for job in self.context.queue.jobs("running", "queued") if job.kind == "flatness"]
        return jobs[0] if jobs else None

    def status(self) -> str:
        """Progress of the measurement or the last failure; empty otherwise."""
        job = self.open_job()
        if job is not None:
            return status_line(why_waiting(self.context, job)) if job.state == "queued" else self._progress(job)
        jobs = [job for job in self.context.queue.jobs() if job.kind == "flatness" and job.state != "cancelled"]
        last = max(jobs, key=lambda one: one.id, default=None)
        if last is None or last.state == "done":
            return ""
        if last.state == "stopped":
            return status_line("The last measurement was stopped.")
        reason, log = why_failed(self.context, last)
        return error_line(reason, log)

    def results(self) -> list[tuple[str, int]]:
        """(label, job number) of the finished measurements, newest first."""
        jobs = [job for job in self.context.queue.jobs("done") if job.kind == "flatness" and self._has_result(job)]
        return [(_title(job), job.id) for job in sorted(jobs, key=lambda job: -job.id)]

    def result(self, job_id: int | None) -> Result:
        """Charts, tables and the surface page. Raises ConfigError for an unknown measurement."""
        if job_id is None:
            return Result(NOTHING if self.runs() else NO_RUNS, "", None)
        job = self.context.runs.database.job(int(job_id))
        if job.kind != "flatness" or not self._has_result(job):
            raise ConfigError("that measurement is not there any more; measure again")
        folder = self.context.queue.output_of(job)
        file = folder / _RESULT
        drawn = _drawn(file, file.stat().st_mtime_ns)
        figures = "".join(_figure(folder / name, drawn[name], text) for name, text in _CHARTS)
        page = folder / "surface.html"
        tables = escape((folder / "flatness.md").read_text(encoding="utf-8"), quote=False)
        message = answer_card(*answer(read_json(file)))
        return Result(f'{message}<div class="fl-charts">{figures}</div>', tables, page if page.is_file() else None)

    def surface(self, job_id: int | None) -> str:
        """The surface to turn and zoom, in a frame whose scripts reach nothing of this page.

        It is handed over with the page, since files are only saved by a browser and never opened.
        """
        if job_id is None:
            return ""
        page = self.result(job_id).surface
        if page is None:
            return status_line(
                "The surface needs plotly, which is not installed: pip install plotly, then measure again."
            )
        title = "Loss surfaces to turn and zoom"
        text = escape(page.read_text(encoding="utf-8"))
        return f'<iframe class="fl-surface" title="{title}" sandbox="allow-scripts" srcdoc="{text}"></iframe>'

    def _has_result(self, job: Job) -> bool:
        return (self.context.queue.output_of(job) / _RESULT).is_file()

    def _progress(self, job: Job) -> str:
        launch = self.context.queue.launch_of(job.id)
        if not launch.command_file.exists():
            return status_line("Starting ...")
        done = sum(1 for line in launch.log(_LOG_LINES) if _MEASURED.search(line))
        count = 1 + len(job.about.get("runs", ()))
        seconds = time.time() - launch.command_file.stat().st_mtime
        text = f"Measuring: {done} of {count} done (the base and each run), for {duration(seconds)} so far."
        return status_line(text, done / count)


def _alike(context: AppContext, run_id: str) -> tuple[object, ...]:
    folder = RunDir(context.runs.get(run_id).folder)
    config = read_json(folder.config_file)
    images = tuple((row["sha256"], row["caption_sha256"]) for row in folder.manifest())
    return config.get("pretrained_model_name_or_path"), config.get("revision"), frozenset(images)


def _title(job: Job) -> str:
    when = datetime.fromtimestamp(job.ended or job.created).strftime("%d %b %H:%M")
    return f"{' and '.join(job.about.get('runs', ())) or 'runs'}, {job.about.get('effort', '')}, {when}"


def _figure(png: Path, chart: str, text: str) -> str:
    """`chart` in the page's colours, with the same as a file to keep."""
    keep = f'<a href="{file_url(png)}" download>PNG</a>' if png.is_file() else ""
    return f"<figure>{chart}<figcaption>{escape(text)}{keep}</figcaption></figure>"


@lru_cache(maxsize=8)
def _drawn(file: Path, changed: int) -> dict[str, str]:
    """SVG charts of a flatness.json by file name; `changed` is the file's modification time.

    They are redrawn from the numbers, so that no markup from a runs folder reaches the browser.
    """
    from flatlora_diffusion.flatness.run_charts import charts_of  # imports torch and matplotlib

    try:
        charts = charts_of(read_json(file))
        return {name: charts[name].svg("fl-plot", text) for name, text in _CHARTS}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the figures in {file.name} are those of another version of this program; measure again"
        ) from error
