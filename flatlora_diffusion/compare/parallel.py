"""Trains several runs in parallel, each in its own process; the results equal those of sequential training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from flatlora_diffusion.compare.arms import STOP_INTERVAL, PlannedRun, train_run, training_command
from flatlora_diffusion.compare.worker_slots import worker_slots
from flatlora_diffusion.config import RunError

logger = logging.getLogger(__name__)

_POLL_INTERVAL = 1.0  # seconds


def train_in_parallel(runs: Sequence[PlannedRun], workers: int | None, cluster: str | None) -> None:
    """Train the unfinished runs, one per worker slot at a time.

    Raises RunError if a training fails; the others then save a checkpoint and stop.
    """
    pending = [planned for planned in runs if not planned.is_finished]
    if pending and pending[0].config.data.with_prior_preservation:  # draws the class images that all runs share
        train_run(pending.pop(0))
    if not pending:
        return
    with worker_slots(workers, cluster) as (count, run), ThreadPoolExecutor(count) as pool:
        logger.info("%d trainings, %d in parallel", len(pending), min(count, len(pending)))
        until_failure = _UntilFailure(run)
        futures = {
            pool.submit(until_failure, training_command(planned), _log_of(planned)): planned for planned in pending
        }
        try:
            _show_progress(dict(futures))
        except BaseException:
            until_failure.is_over = True
            _stop_all(futures)
            raise


class _UntilFailure:
    """Runs commands until one fails; later commands, which a pool's threads would take up, do not start."""

    def __init__(self, run: Callable[[Sequence[str], Path], int]) -> None:
        self.is_over = False
        self._run = run

    def __call__(self, command: Sequence[str], log: Path) -> int | None:
        """Return the exit code; None for a command that was not started."""
        if self.is_over:
            return None
        code = None
        try:
            code = self._run(command, log)
        finally:
            self.is_over |= code != 0
        return code


def _show_progress(futures: dict[Future[int | None], PlannedRun]) -> None:
    """Show a progress bar until all trainings have ended. Raises RunError when one fails."""
    total = sum(planned.steps for planned in futures.values())
    done = 0
    with tqdm(total=total, unit="step", desc="training") as bar:
        while futures:
            for ended in wait(futures, _POLL_INTERVAL, FIRST_COMPLETED)[0]:
                planned = futures.pop(ended)
                done += planned.steps
                if ended.result() not in (0, None):  # None: not started, because another one has failed
                    raise RunError(
                        f"training {planned.label} ended with exit code {ended.result()}; see its messages in "
                        f"{_log_of(planned)}"
                    )
            running = {planned.label: _steps_done(planned) for future, planned in futures.items() if future.running()}
            bar.set_postfix_str(", ".join(f"{label}: {steps}" for label, steps in running.items()))
            bar.update(done + sum(running.values()) - bar.n)


def _stop_all(runs: Mapping[Future[int | None], PlannedRun]) -> None:
    """Cancel the trainings that have not started, and request a stop of the others until they have ended."""
    running = {future for future in runs if not future.cancel()}
    while running:
        for future in running:
            if not future.done():
                runs[future].request_stop()
        running = wait(running, STOP_INTERVAL).not_done


def _steps_done(planned: PlannedRun) -> int:
    steps = planned.run.steps()
    return min(steps[-1]["step"] + 1, planned.steps) if steps else 0


def _log_of(planned: PlannedRun) -> Path:
    """The log file, beside the run's folder like its settings."""
    return planned.run.folder.with_name(f"{planned.run.folder.name}.log")
