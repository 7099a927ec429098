"""All runs of a runs folder, also those that a command line has started: what they are at, and what may be done.

Below the runs folder, `.app/` is the app's own (database, launches with their logs) and `.trash/` has deleted runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from flatlora_diffusion.config import ConfigError, with_legacy_defaults
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir

from ..jobs.launch import LOG_LINES, Launch
from ..jobs.store import Label, Store
from ..watch.kept import Kept
from ..watch.run_places import RunPlaces, Signs
from .names import checked_text, folder_of, is_run
from .phase import phase_of
from .processes import Trainers, read_json
from .progress import EventLog, Preview, Progress
from .settings import checked_config, near
from .state import RunFiles, RunState, judge, parts_of
from .trash import Trash

_RESUMABLE: tuple[RunState, ...] = ("stopped", "failed", "interrupted")
_LONGEST_NOTE = 2000
Value = TypeVar("Value")


@dataclass(frozen=True)
class Run:
    """One run as it is now. `log`: the last lines of a run that failed; `changed`: seconds since 1970.

    phase: what a running one is busy with, in words.
    """

    id: str
    folder: Path
    label: Label
    state: RunState
    progress: Progress
    exit_code: int | None
    advice: str
    log: tuple[str, ...]
    checkpoints: tuple[str, ...]
    method: str | None
    changed: float
    phase: str = ""
    has_parts: bool = False

    @property
    def name(self) -> str:
        """The name to show."""
        return self.label.name or self.id

    @property
    def is_resumable(self) -> bool:
        return self.state in _RESUMABLE and (bool(self.checkpoints) or self.has_parts)


class RunStore:
    """The runs below `folder`. Safe under several threads; several processes may have one each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private = folder / ".app"
        self.temporary = self.private / "temporary"
        self.store = Store(self.private / "app.db")
        self._places = RunPlaces(folder, self.private / "runs")
        self.trash = Trash(folder / ".trash", folder, self._places.launches, self.store)
        self._logs: dict[str, EventLog] = {}
        self._trainers = Trainers()
        self._kept: Kept[Any] = Kept()

    def all(self) -> list[Run]:
        """All runs, the one that changed last first."""
        queued, labels = self._queued(), self.store.labels()
        ids = {*self._places.ids(), *queued, *self._places.launched()}
        return sorted(
            (self._run(run_id, run_id in queued, labels.get(run_id, Label())) for run_id in ids),
            key=lambda run: -run.changed,
        )

    def get(self, run_id: str) -> Run:
        """Raises ConfigError when there is no such run."""
        folder = folder_of(self.folder, run_id)
        is_queued = run_id in self._queued()
        if not (is_run(folder) or is_queued or self.last_launch(run_id)):
            raise ConfigError(f"there is no run {run_id!r} in the runs folder")
        return self._run(run_id, is_queued, self.store.labels().get(run_id, Label()))

    def reserve(self, name: str) -> str:
        """The id of a new run called `name`, or like it when that is taken; nobody else gets the same."""
        return self._places.reserve(name)

    def release(self, run_id: str) -> None:
        """Give back an id that was never used."""
        self._places.release(run_id)

    def next_launch(self, run_id: str) -> Launch:
        """The folder of the run's next start, not made yet."""
        return self._places.next_launch(run_id)

    def last_launch(self, run_id: str) -> Launch | None:
        """The app's last start of the run; None for one that only command lines have started."""
        return self._places.last_launch(run_id)

    def start(self, run_id: str, settings: Mapping[str, Any], launch: Launch) -> None:
        """Train with `settings` in the run's folder. Raises ConfigError for settings that cannot be."""
        folder = folder_of(self.folder, run_id)
        config = checked_config(settings).replace(output_dir=str(folder))
        launch.folder.mkdir(parents=True)
        write_json(launch.settings_file, near(config.to_dict()))
        command = ["-m", "flatlora_diffusion", "train", "--config", str(launch.settings_file)]
        launch.start(command, RunDir(folder).stop_file)

    def stop(self, run_id: str, at_once: bool = False) -> None:
        """Ask the run to save and end after its step; `at_once` kills it, back to its last checkpoint.

        Raises ConfigError when it does not run, or cannot be killed from here.
        """
        folder, launch = self._running(run_id), self.last_launch(run_id)
        is_ours = launch is not None and launch.is_running()
        if launch is not None and is_ours:
            launch.kill() if at_once else launch.ask_to_stop()
        elif at_once:
            raise ConfigError(f"{run_id} was started from a command line; press Ctrl-C there")
        if folder.is_dir() and not at_once:
            RunDir(folder).stop_file.touch()

    def save_now(self, run_id: str) -> None:
        """Ask for a checkpoint after the current step. Raises ConfigError when the run has not begun or has ended."""
        folder = self._running(run_id)
        if not folder.is_dir():
            raise ConfigError(f"{run_id} has not taken a step yet; there is nothing to save")
        RunDir(folder).save_file.touch()

    def settings(self, run_id: str) -> dict[str, Any]:
        """The run's settings by flat name, as they were given if the app has started it, else as they were saved."""
        self.get(run_id)
        launch = self.last_launch(run_id)
        values = {} if launch is None else launch.settings()
        queued = self._queued()
        return with_legacy_defaults(values or queued.get(run_id) or RunDir(folder_of(self.folder, run_id)).config())

    def clone_settings(self, run_id: str) -> dict[str, Any]:
        """The settings for a new run like this one: its own but for its place."""
        values = self.settings(run_id)
        return {name: value for name, value in values.items() if name not in ("output_dir", "resume_from_checkpoint")}

    def resume_settings(self, run_id: str) -> dict[str, Any]:
        """The settings that let the run go on. Raises ConfigError when it cannot."""
        run = self.get(run_id)
        if not run.is_resumable:
            why = f"it is {run.state}" if run.checkpoints else "no checkpoint was saved; start it again from a clone"
            raise ConfigError(f"{run.name} cannot be resumed: {why}")
        return self.settings(run_id) | {"resume_from_checkpoint": "latest"}

    def made_of(self, run: Run, what: str, make: Callable[[], Value]) -> Value:
        """What `make` gives, called again only when the state or a file has changed; of a run at work each time."""
        files = None if run.state == "running" else self._places.files(run.id)
        value: Value = self._kept.get((run.id, run.state, what), lambda: (make(), files))
        return value

    def signs(self, run_ids: Iterable[str] | None = None) -> Signs | None:
        """What tells that runs, jobs and labels are as they were: see `RunPlaces.signs`."""
        return self._places.signs(self.store.files, run_ids)

    def losses(self, run_id: str) -> list[tuple[int, float]]:
        """(step, loss) of each optimizer step."""
        return self._events(run_id).losses()

    def validation_losses(self, run_id: str) -> list[tuple[int, float]]:
        """(steps done, loss of images not trained on)."""
        return self._events(run_id).validation_losses()

    def previews(self, run_id: str) -> list[Preview]:
        """The previews so far, in order of steps."""
        return self._events(run_id).previews(RunDir(folder_of(self.folder, run_id)).images)

    def log(self, run_id: str, lines: int = LOG_LINES) -> list[str]:
        """The end of what the trainer has printed; empty for a run from a command line."""
        launch = self.last_launch(run_id)
        return [] if launch is None else launch.log(lines)

    def exports(self, run_id: str) -> dict[str, Path]:
        """The files to download that there are: `diffusers`, `kohya` (the LoRA in both formats), `card`."""
        folder = folder_of(self.folder, run_id)
        run = RunDir(folder)
        name = run.lora_name(read_json(run.config_file).get("output_name"))
        files = {"diffusers": LORA_FILE, "kohya": f"{name}.safetensors", "card": "README.md"}
        return {kind: folder / file for kind, file in files.items() if (folder / file).is_file()}

    def size(self, run_id: str) -> int:
        """Bytes on the disk."""
        folder = folder_of(self.folder, run_id)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())

    def rename(self, run_id: str, name: str) -> None:
        """Show the run as `name`, or with an empty one as its folder is called. The folder is not renamed."""
        self._relabel(run_id, name=None if name.strip() == run_id else checked_text("name", name) or None)

    def tag(self, run_id: str, *tags: str) -> None:
        """Set the run's tags."""
        checked_text("list of tags", ", ".join(tags), _LONGEST_NOTE)
        self._relabel(run_id, tags=tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip())))

    def note(self, run_id: str, text: str) -> None:
        """Set the run's note."""
        checked_text("note", text.replace("\n", " "), _LONGEST_NOTE)
        self._relabel(run_id, note=text)

    def delete(self, run_id: str) -> str:
        """Move the run into the trash; returns the key for `trash.undo`.

        Raises ConfigError while it runs or waits, and when other runs lie in its folder and would go with it.
        """
        run = self.get(run_id)
        inner = [one for one in self._places.ids() if one.startswith(f"{run_id}/")]
        if inner:
            more = f" and {len(inner) - 1} more" if len(inner) > 1 else ""
            raise ConfigError(f"{run.name} has other runs in its folder, {inner[0]}{more}; delete those first")
        if run.state in ("running", "queued"):
            raise ConfigError(f"{run.name} is {run.state}; stop it before you delete it")
        return self.trash.delete(run_id)

    def _run(self, run_id: str, is_queued: bool, label: Label) -> Run:
        """The run as it is; one that has ended is looked at again only when its files have changed."""
        run, is_trained = self._kept.get((run_id, is_queued), lambda: self._look(run_id, is_queued))
        if self._trainers.is_at(run.folder) != is_trained:
            run, _ = self._look(run_id, is_queued)[0]
        return replace(run, label=label)

    def _look(self, run_id: str, is_queued: bool) -> tuple[tuple[Run, bool], Iterable[str] | None]:
        """((the run without its label, whether a trainer from a command line is at it), what it was made of)."""
        folder = folder_of(self.folder, run_id)
        run, launch = RunDir(folder), self.last_launch(run_id)
        settings = read_json(run.config_file) or ({} if launch is None else launch.settings())
        progress = self._events(run_id).progress(settings.get("max_train_steps"))
        checkpoints = run.checkpoints() if folder.is_dir() else []
        files = RunFiles.of(folder, checkpoints)
        is_trained = self._trainers.is_at(folder)
        verdict = judge(launch, progress, files, is_queued, is_trained)
        is_running = verdict.state == "running"
        has_previews = bool(settings.get("validation_prompt") or settings.get("validation_prompts_file"))
        places = (run.events_file, run.config_file, self._places.private(run_id))
        found = Run(
            id=run_id,
            folder=folder,
            label=Label(),
            state=verdict.state,
            progress=progress,
            exit_code=verdict.exit_code,
            advice=verdict.advice,
            log=tuple(launch.log()) if launch is not None and verdict.state in ("failed", "interrupted") else (),
            checkpoints=tuple(path.name for path in checkpoints),
            method=settings.get("method"),
            phase=phase_of(run, launch, progress, has_previews) if is_running else "",
            has_parts=parts_of(folder) is not None,
            changed=max((path.stat().st_mtime for path in places if path.exists()), default=0.0),
        )
        return (found, is_trained), None if is_running else self._places.files(run_id)

    def _queued(self) -> dict[str, dict[str, Any]]:
        """The settings of the runs that wait, also of one that the queue has taken and not launched yet."""
        waiting = {}
        for job in self.store.jobs("queued", "running"):
            if job.run is None or not isinstance(job.settings, dict):
                continue
            if job.state == "queued" or self.last_launch(job.run) is None:
                waiting[job.run] = job.settings
        return waiting

    def _running(self, run_id: str) -> Path:
        run = self.get(run_id)
        if run.state != "running":
            raise ConfigError(f"{run.name} does not run; it is {run.state}")
        return run.folder

    def _events(self, run_id: str) -> EventLog:
        path = RunDir(folder_of(self.folder, run_id)).events_file
        return self._logs.setdefault(run_id, EventLog(path))

    def _relabel(self, run_id: str, **values: Any) -> None:
        self.store.set_label(run_id, replace(self.get(run_id).label, **values))
