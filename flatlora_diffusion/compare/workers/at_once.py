"""Several runs at once, each in a process of its own; what they leave is what they leave one after the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from flatlora_diffusion.compare.arms import PlannedRun, train_planned, training_command
from flatlora_diffusion.compare.workers.places import places
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
        _follow({pool.submit(run, training_command(planned), _log_of(planned)): planned for planned in left})


def _follow(waiting: dict[Future[int], PlannedRun]) -> None:
    total = sum(planned.steps for planned in waiting.values())
    done = 0
    try:
        with tqdm(total=total, unit="step", desc="training") as bar:
            while waiting:
                for ended in wait(waiting, _LOOK_EVERY, FIRST_COMPLETED)[0]:
                    planned = waiting.pop(ended)
                    done += planned.steps
                    if ended.result() != 0:
                        raise RunError(
                            f"training {planned.label} ended with exit code {ended.result()}; its message is in "
                            f"{_log_of(planned)}"
                        )
                going = {planned.label: _steps_done(planned) for one, planned in waiting.items() if one.running()}
                bar.set_postfix_str(", ".join(f"{label}: {steps}" for label, steps in going.items()))
                bar.update(done + sum(going.values()) - bar.n)
    except BaseException:
        for future, planned in waiting.items():
            if not future.cancel():
                planned.run.stop_file.touch()
        raise


def _steps_done(planned: PlannedRun) -> int:
    steps = [event["step"] + 1 for event in planned.run.events() if event["event"] == "step"]
    return min(steps[-1], planned.steps) if steps else 0


def _log_of(planned: PlannedRun) -> Path:
    """Beside the run's folder, where its settings are too."""
    return planned.run.folder.with_name(f"{planned.run.folder.name}.log")
