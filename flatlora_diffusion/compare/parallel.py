"""Several runs at once, each in a process of its own; what they leave is what they leave one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from flatlora_diffusion.compare.arms import ASK_EVERY, PlannedRun, train_planned, training_command
from flatlora_diffusion.compare.worker_slots import places
from flatlora_diffusion.config import RunError

logger = logging.getLogger(__name__)

_LOOK_EVERY = 1.0  # seconds


def train_at_once(runs: Sequence[PlannedRun], workers: int | None, cluster: str | None) -> None:
    """Train what is not trained yet, as many at once as there are places.

    Raises RunError when one does not end well; the others then save what they need to go on, as after a stop.
    """
    left = [planned for planned in runs if not planned.is_finished]
    if left and left[0].config.data.with_prior_preservation:  # it draws the class images that all of them share
        train_planned(left.pop(0))
    if not left:
        return
    with places(workers, cluster) as (count, run), ThreadPoolExecutor(count) as pool:
        logger.info("%d trainings, %d at once", len(left), min(count, len(left)))
        until_failure = _UntilFailure(run)
        waiting = {pool.submit(until_failure, training_command(one), _log_of(one)): one for one in left}
        try:
            _follow(dict(waiting))
        except BaseException:
            until_failure.is_over = True
            _stop(waiting)
            raise


class _UntilFailure:
    """Runs commands as `run` does. Once one has failed, none begins: the threads of a pool take the next at once."""

    def __init__(self, run: Callable[[Sequence[str], Path], int]) -> None:
        self.is_over = False
        self._run = run

    def __call__(self, command: Sequence[str], log: Path) -> int | None:
        """The exit code; None for a command that was not begun."""
        if self.is_over:
            return None
        code = None
        try:
            code = self._run(command, log)
        finally:
            self.is_over |= code != 0
        return code


def _follow(waiting: dict[Future[int | None], PlannedRun]) -> None:
    total = sum(planned.steps for planned in waiting.values())
    done = 0
    with tqdm(total=total, unit="step", desc="training") as bar:
        while waiting:
            # One that has not begun is passed over: the one that failed is among those that have ended.
            for ended in wait(waiting, _LOOK_EVERY, FIRST_COMPLETED)[0]:
                planned = waiting.pop(ended)
                done += planned.steps
                if ended.result() not in (0, None):
                    raise RunError(
                        f"training {planned.label} ended with exit code {ended.result()}; its message is in "
                        f"{_log_of(planned)}"
                    )
            going = {planned.label: _steps_done(planned) for one, planned in waiting.items() if one.running()}
            bar.set_postfix_str(", ".join(f"{label}: {steps}" for label, steps in going.items()))
            bar.update(done + sum(going.values()) - bar.n)


def _stop(runs: Mapping[Future[int | None], PlannedRun]) -> None:
    """Returns when all have ended. Those that have not begun never do."""
    going = {future for future in runs if not future.cancel()}
    while going:
        for future in going:
            if not future.done():
                runs[future].ask_to_stop()
        going = wait(going, ASK_EVERY).not_done


def _steps_done(planned: PlannedRun) -> int:
    steps = planned.run.steps()
    return min(steps[-1]["step"] + 1, planned.steps) if steps else 0


def _log_of(planned: PlannedRun) -> Path:
    """Beside the run's folder, where its settings are too."""
    return planned.run.folder.with_name(f"{planned.run.folder.name}.log")
