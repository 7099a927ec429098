"""The queue: one heavy job at a time, across restarts of the app and with several apps on one runs folder."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flatlora_diffusion.config import ConfigError, StoppedError, TrainConfig

from ..errors import describe_error
from ..process.database import Job, JobKind, JobState, NewJob
from ..process.launch import Launch
from ..runs.run_config import checked_config
from ..runs.runs import RunStore

logger = logging.getLogger(__name__)

ARMS = ("lora", "flat-lora")
_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 5
_PERCENT = re.compile(r"(\d{1,3})%\|")


class JobQueue:
    """The queue of a RunStore. Any app on the folder may add and stop jobs; one of them starts the jobs."""

    def __init__(self, runs: RunStore) -> None:
        self._runs, self._store = runs, runs.database
        self._lock = FileLock(runs.private / "queue.lock", thread_local=False)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def add_training(self, config: TrainConfig, name: str, session: str) -> Job:
        """Queue a training as a new run called `name` (`job.run` is its id). Raises ConfigError for wrong settings,
        and when the same waits or runs already.
        """
        return self._add_trainings([(name, config)], session, None, config)[0]

    def add_pair(self, config: TrainConfig, name: str, session: str) -> list[Job]:
        """Queue LoRA and Flat-LoRA with equal settings and seed, as the runs NAME-lora and NAME-flat-lora."""
        ordered = config
        if config.run.seed is None:
            config = config.replace(seed=secrets.randbelow(2**31))
        lora, flat = config.of_method("lora"), config.of_method("flat-lora")
        arms = [(f"{name}-{arm}", one) for arm, one in zip(ARMS, (lora, flat), strict=True)]
        return self._add_trainings(arms, session, secrets.token_hex(8), ordered)

    def add_resume(self, run_id: str, session: str) -> Job:
        """Queue a run to be resumed from its newest checkpoint. Raises ConfigError if it is not resumable."""
        return self._store.add_jobs([NewJob("resume", self._runs.resume_settings(run_id), session, run_id)])[0]

    def add_command(
        self, kind: JobKind, arguments: Sequence[str], session: str, about: Mapping[str, Any] | None = None
    ) -> Job:
        """Queue `python -m flatlora_diffusion ARGUMENTS --output_dir FOLDER`, with FOLDER = `output_of(job)`.

        Args:
            about: details to store with the job.
        """
        return self._store.add_jobs([NewJob(kind, list(arguments), session, about=dict(about or {}))])[0]

    def output_of(self, job: Job) -> Path:
        """The output folder of a job that is not a training; below the runs folder, so that it may be served."""
        return self._runs.folder / ".results" / f"job-{job.id}"

    def jobs(self, *states: JobState) -> list[Job]:
        """The jobs in these states, or all, in queue order."""
        return self._store.jobs(*states)

    def recent_runs(self) -> list[str]:
        """The ids of the runs that train or wait; without any, the newest with its partner; in order."""
        jobs = [job for job in self.jobs() if job.run is not None and job.state != "cancelled"]
        active = [job for job in jobs if job.state in ("running", "queued")]
        focus = active or jobs[-1:]
        pairs = {job.pair for job in focus if job.pair}
        wanted = dict.fromkeys(job.run for job in jobs if job in focus or job.pair in pairs)
        return list(filter(None, wanted))

    def put_first(self, job_id: int) -> None:
        """Move a waiting job to the front. Raises ConfigError if it does not wait any more."""
        waiting = self._store.jobs("queued")
        if not waiting or not self._store.change_job(job_id, "queued", position=waiting[0].position - 1):
            raise ConfigError("that job does not wait any more")

    def move_up(self, job_id: int) -> None:
        """Move a waiting job before the one above it. Raises ConfigError if it does not wait any more."""
        waiting = self._store.jobs("queued")
        place = next((place for place, job in enumerate(waiting) if job.id == job_id), None)
        if place is None:
            raise ConfigError("that job does not wait any more")
        if place:
            before = waiting[place - 1].position
            above = waiting[place - 2].position if place > 1 else before - 2
            self._store.change_job(job_id, "queued", position=(before + above) / 2)

    def cancel_waiting(self) -> int:
        """Cancel all waiting jobs, and return their number."""
        waiting = self._store.jobs("queued")
        for job in waiting:
            self.stop(job.id)
        return len(waiting)

    def preempt(self, job_id: int) -> None:
        """Move a waiting job to the front and pause the running training, which is resumed afterwards."""
        self.put_first(job_id)
        for job in self._store.jobs("running"):
            if job.run is None:
                continue  # what cannot be resumed is not stopped
            self._store.change_job(job.id, "running", goes_on=1)
            self.launch_of(job.id).ask_to_stop()

    def stop(self, job_id: int, immediately: bool = False) -> None:
        """Cancel a waiting job, or ask a running job to stop; a finished job is left alone."""
        job = self._store.job(job_id)
        if self._store.change_job(job_id, "queued", state="cancelled"):
            if job.kind == "train" and job.run is not None:
                self._runs.paths.release(job.run)
            return
        if not self._store.change_job(job_id, "running", goes_on=0):
            return
        launch = self.launch_of(job_id)
        if job.run is not None and not immediately:
            self._runs.stop(job.run)
        elif immediately:
            launch.kill()
        else:
            launch.ask_to_stop()

    def launch_of(self, job_id: int) -> Launch:
        """The log and the processes of a job that was started. Raises ConfigError before that."""
        job = self._store.job(job_id)
        if job.launch is None:
            raise ConfigError(f"job {job_id} was not started")
        return Launch(self._runs.private / job.launch)

    def fraction(self, job: Job) -> float | None:
        """The progress of a running job, 0 to 1, by its run or the progress bar in its log; None if unknown."""
        if job.run is not None:
            return self._runs.get(job.run).progress.fraction
        if job.launch is None:
            return None
        percents = [found[-1] for line in self.launch_of(job.id).log() if (found := _PERCENT.findall(line))]
        return int(percents[-1]) / 100 if percents else None

    def start(self) -> None:
        """Run the queue in the background, or take over when another app that runs it ends."""
        self._thread = threading.Thread(target=self._run_until_closed, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop starting jobs. A running job continues."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)  # it may wait for the database
        self._lock.release()

    def tick(self) -> bool:
        """Record finished jobs and start the next one; False when another app runs the queue."""
        try:
            if not self._lock.is_locked:
                self._lock.acquire(timeout=0)
        except Timeout:
            return False
        preempted = []
        for job in self._store.jobs("running"):
            launch = self.launch_of(job.id)
            if launch.is_running():
                return True
            if self._end(job, launch) == "stopped" and job.goes_on:
                preempted.append(job)
        waiting = self._store.jobs("queued")
        if waiting:
            self._start(waiting[0])
        for job in preempted:
            self._go_on(job)
        return True

    def _run_until_closed(self) -> None:
        last_warning = ""
        while not self._closing.wait(_POLL_SECONDS):
            try:
                self.tick()
                last_warning = ""
            except (OSError, sqlite3.OperationalError) as error:  # a full disk, a locked database: it may be over soon
                if str(error) != last_warning:
                    logger.warning("the queue cannot go on and tries again: %s", error)
                last_warning = str(error)

    def _add_trainings(
        self, named: Sequence[tuple[str, TrainConfig]], session: str, pair: str | None, ordered: TrainConfig
    ) -> list[Job]:
        names = [name for name, _ in named]
        order = json.dumps([names, ordered.to_dict()])
        if any(job.about.get("order") == order for job in self._store.jobs("queued", "running")):
            raise ConfigError(
                f"{' and '.join(names)} with these settings waits or trains already; "
                "change the name or a setting to train it once more"
            )
        settings = [checked_config(config.to_dict()).to_dict() for _, config in named]
        runs: list[str] = []
        try:
            runs += (self._runs.paths.reserve(name) for name, _ in named)
            arms = zip(runs, settings, strict=True)
            return self._store.add_jobs(
                [NewJob("train", one, session, run, pair, {"order": order}) for run, one in arms]
            )
        except (OSError, sqlite3.Error):  # a full disk
            for run in runs:
                self._runs.paths.release(run)
            raise

    def _start(self, job: Job) -> None:
        launch = self._next_launch(job)
        place = launch.folder.relative_to(self._runs.private).as_posix()
        if not self._store.change_job(job.id, "queued", state="running", launch=place):
            return  # it was cancelled just now
        try:
            self._launch(job, launch)
        except (ConfigError, OSError) as error:
            self._set_ended(job, "failed", None, describe_error(error))

    def _launch(self, job: Job, launch: Launch) -> None:
        if isinstance(job.settings, dict):
            assert job.run is not None
            self._runs.start(job.run, job.settings, launch)
            return
        output = ["--output_dir", str(self.output_of(job))]
        launch.start(["-m", "flatlora_diffusion", *job.settings, *output])

    def _next_launch(self, job: Job) -> Launch:
        if job.run is not None:
            return self._runs.paths.next_launch(job.run)
        return Launch(self._runs.private / "commands" / f"job-{job.id}")

    def _end(self, job: Job, launch: Launch) -> JobState:
        ending = launch.ending()
        if ending is None:
            return self._set_ended(job, "failed", None, "its process was killed, or the computer was switched off")
        if ending.code == 0:
            return self._set_ended(job, "done", 0, None)
        is_stopped = ending.code == StoppedError.exit_code or ending.was_asked
        return self._set_ended(job, "stopped" if is_stopped else "failed", ending.code, None)

    def _set_ended(self, job: Job, state: JobState, code: int | None, error: str | None) -> JobState:
        values: dict[str, Any] = {"state": state, "exit_code": code, "error": error, "ended": time.time()}
        self._store.change_job(job.id, "running", **values)
        return state

    def _go_on(self, job: Job) -> None:
        """Queue a preempted training as the next job."""
        assert job.run is not None
        try:
            settings = self._runs.resume_settings(job.run)
        except ConfigError:
            logger.warning("%s made way for another job and has no checkpoint to go on from", job.run)
            return
        self._store.add_jobs([NewJob("resume", settings, job.session, job.run)], first=True)
