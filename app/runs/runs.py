"""All runs of a runs folder, including those started from a command line: their states and actions.

In the runs folder, `.app/` has the app's own files (database, launches with logs) and `.trash/` the deleted runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from flatlora_diffusion.config import ConfigError, with_legacy_defaults
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir

from ..process.database import Database, Label
from ..process.file_cache import FileCache
from ..process.json_file import read_json
from ..process.launch import LOG_LINES, Launch
from ..process.processes import Trainers
from .names import checked_text, folder_of, is_run, size_of
from .progress import EventLog, Progress
from .run_config import checked_config, with_relative_paths
from .run_paths import Fingerprint, RunPaths
from .state import RunFiles, RunState, parts_of, phase_of, run_state
from .trash import Trash

_RESUMABLE: tuple[RunState, ...] = ("stopped", "failed", "interrupted")
_MAX_NOTE_LENGTH = 2000
Value = TypeVar("Value")


@dataclass(frozen=True)
class Run:
    """One run at this moment.

    Attributes:
        log: last lines of a failed run.
        changed: seconds since 1970.
        phase: the phase of a running run, in words.
        has_parts: whether members have saved something to resume from.
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
    """The runs below `folder`. Thread-safe; several processes may each have a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private = folder / ".app"
        self.temporary = self.private / "temporary"
        self.database = Database(self.private / "app.db")
        self.paths = RunPaths(folder, self.private / "runs")
        self.trash = Trash(folder / ".trash", folder, self.paths.launches, self.database)
        self._logs: dict[str, EventLog] = {}
        self._trainers = Trainers()
        self._kept: FileCache[Any] = FileCache()

    def all(self) -> list[Run]:
        """All runs, most recently changed first."""
        queued, labels = self._queued(), self.database.labels()
        ids = {*self.paths.ids(), *queued, *self.paths.launched()}
        return sorted(
            (self._run(run_id, run_id in queued, labels.get(run_id, Label())) for run_id in ids),
            key=lambda run: -run.changed,
        )

    def get(self, run_id: str) -> Run:
        """Raises ConfigError for an unknown run."""
        folder = folder_of(self.folder, run_id)
        is_queued = run_id in self._queued()
        if not (is_run(folder) or is_queued or self.paths.last_launch(run_id)):
            raise ConfigError(f"there is no run {run_id!r} in the runs folder")
        return self._run(run_id, is_queued, self.database.labels().get(run_id, Label()))

    def start(self, run_id: str, settings: Mapping[str, Any], launch: Launch) -> None:
        """Train with `settings` in the run's folder. Raises ConfigError for wrong settings."""
        folder = folder_of(self.folder, run_id)
        config = checked_config(settings).replace(output_dir=str(folder))
        launch.folder.mkdir(parents=True)
        write_json(launch.settings_file, with_relative_paths(config.to_dict()))
        command = ["-m", "flatlora_diffusion", "train", "--config", str(launch.settings_file)]
        launch.start(command, RunDir(folder).stop_file)

    def stop(self, run_id: str, immediately: bool = False) -> None:
        """Ask the run to save and end after its step; with `immediately`, kill it.

        Raises ConfigError if it is not running, or cannot be killed from here.
        """
        folder, launch = self._running(run_id), self.paths.last_launch(run_id)
        is_ours = launch is not None and launch.is_running()
        if launch is not None and is_ours:
            launch.kill() if immediately else launch.ask_to_stop()
        elif immediately:
            raise ConfigError(f"{run_id} was started from a command line; press Ctrl-C there")
        if folder.is_dir() and not immediately:
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
        launch = self.paths.last_launch(run_id)
        values = {} if launch is None else launch.settings()
        queued = self._queued()
        return with_legacy_defaults(values or queued.get(run_id) or RunDir(folder_of(self.folder, run_id)).config())

    def clone_settings(self, run_id: str) -> dict[str, Any]:
        """The settings for a new run like this one, without its folder."""
        values = self.settings(run_id)
        return {name: value for name, value in values.items() if name not in ("output_dir", "resume_from_checkpoint")}

    def resume_settings(self, run_id: str) -> dict[str, Any]:
        """The settings that resume the run. Raises ConfigError if it is not resumable."""
        run = self.get(run_id)
        if not run.is_resumable:
            why = f"it is {run.state}" if run.checkpoints else "no checkpoint was saved; start it again from a clone"
            raise ConfigError(f"{run.name} cannot be resumed: {why}")
        return self.settings(run_id) | {"resume_from_checkpoint": "latest"}

    def cached(self, run: Run, what: str, make: Callable[[], Value]) -> Value:
        """The value of `make()`, cached until the state or a file of the run changes; never for a running run."""
        files = None if run.state == "running" else self.paths.files(run.id)
        value: Value = self._kept.get((run.id, run.state, what), lambda: (make(), files))
        return value

    def fingerprint(self, run_ids: Iterable[str] | None = None) -> Fingerprint | None:
        """A fingerprint of runs, jobs and labels: see `RunPaths.fingerprint`."""
        return self.paths.fingerprint(self.database.files, run_ids)

    def events(self, run_id: str) -> EventLog:
        """The run's losses and previews. Raises ConfigError for an id outside of the runs folder."""
        run = RunDir(folder_of(self.folder, run_id))
        return self._logs.setdefault(run_id, EventLog(run))

    def log(self, run_id: str, lines: int = LOG_LINES) -> list[str]:
        """The end of the trainer's output; empty for a run from a command line."""
        launch = self.paths.last_launch(run_id)
        return [] if launch is None else launch.log(lines)

    def exports(self, run_id: str) -> dict[str, Path]:
        """The files to download that exist: `diffusers`, `kohya` (the LoRA in both formats), `model_card`."""
        folder = folder_of(self.folder, run_id)
        run = RunDir(folder)
        name = run.lora_name(read_json(run.config_file).get("output_name"))
        files = {"diffusers": LORA_FILE, "kohya": f"{name}.safetensors", "model_card": "README.md"}
        return {kind: folder / file for kind, file in files.items() if (folder / file).is_file()}

    def size(self, run_id: str) -> int:
        """Bytes on the disk."""
        return size_of(folder_of(self.folder, run_id))

    def rename(self, run_id: str, name: str) -> None:
        """Set the displayed name; an empty name resets it to the folder's. The folder is not renamed."""
        self._relabel(run_id, name=None if name.strip() == run_id else checked_text("name", name) or None)

    def tag(self, run_id: str, *tags: str) -> None:
        """Set the run's tags."""
        checked_text("list of tags", ", ".join(tags), _MAX_NOTE_LENGTH)
        self._relabel(run_id, tags=tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip())))

    def note(self, run_id: str, text: str) -> None:
        """Set the run's note."""
        checked_text("note", text.replace("\n", " "), _MAX_NOTE_LENGTH)
        self._relabel(run_id, note=text)

    def delete(self, run_id: str) -> str:
        """Move the run into the trash; returns the key for `trash.undo`.

        Raises ConfigError for a running or waiting run, and for a folder that contains other runs.
        """
        run = self.get(run_id)
        inner = [one for one in self.paths.ids() if one.startswith(f"{run_id}/")]
        if inner:
            more = f" and {len(inner) - 1} more" if len(inner) > 1 else ""
            raise ConfigError(f"{run.name} has other runs in its folder, {inner[0]}{more}; delete those first")
        if run.state in ("running", "queued"):
            raise ConfigError(f"{run.name} is {run.state}; stop it before you delete it")
        return self.trash.delete(run_id)

    def _run(self, run_id: str, is_queued: bool, label: Label) -> Run:
        """The run's state; a finished run is only read again when its files have changed."""
        run, is_trained = self._kept.get((run_id, is_queued), lambda: self._look(run_id, is_queued))
        if self._trainers.is_training_in(run.folder) != is_trained:
            run, _ = self._look(run_id, is_queued)[0]
        return replace(run, label=label)

    def _look(self, run_id: str, is_queued: bool) -> tuple[tuple[Run, bool], Iterable[str] | None]:
        """((the run without its label, whether a command-line trainer runs it), the files it depends on)."""
        folder = folder_of(self.folder, run_id)
        run, launch = RunDir(folder), self.paths.last_launch(run_id)
        settings = read_json(run.config_file) or ({} if launch is None else launch.settings())
        steps, members = settings.get("max_train_steps"), settings.get("members") or 1
        progress = self.events(run_id).progress(steps and steps * members)
        checkpoints = run.checkpoints() if folder.is_dir() else []
        files = RunFiles.of(folder, checkpoints)
        is_trained = self._trainers.is_training_in(folder)
        verdict = run_state(launch, progress, files, is_queued, is_trained)
        is_running = verdict.state == "running"
        has_previews = bool(settings.get("validation_prompt") or settings.get("validation_prompts_file"))
        places = (run.events_file, run.config_file, self.paths.private(run_id))
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
        return (found, is_trained), None if is_running else self.paths.files(run_id)

    def _queued(self) -> dict[str, dict[str, Any]]:
        """The settings of waiting runs, and of runs that the queue has taken but not launched."""
        waiting = {}
        for job in self.database.jobs("queued", "running"):
            if job.run is None or not isinstance(job.settings, dict):
                continue
            if job.state == "queued" or self.paths.last_launch(job.run) is None:
                waiting[job.run] = job.settings
        return waiting

    def _running(self, run_id: str) -> Path:
        run = self.get(run_id)
        if run.state != "running":
            raise ConfigError(f"{run.name} does not run; it is {run.state}")
        return run.folder

    def _relabel(self, run_id: str, **values: Any) -> None:
        self.database.set_label(run_id, replace(self.get(run_id).label, **values))
