"""TensorBoard and its kin, told of a run. events.jsonl has it all, so a tracker that fails costs the run nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from accelerate import Accelerator

from flatlora_diffusion.config import RunError, TrainConfig
from flatlora_diffusion.storage.formatting import first_line
from flatlora_diffusion.storage.saved_config import portable

logger = logging.getLogger(__name__)


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Raises RunError when one cannot be started."""
    values = {name: value for name, value in portable(config.to_dict()).items() if value is not None}
    try:
        accelerator.init_trackers("flatlora", config=values)
    except Exception as error:  # a login, a network, a disk: every tracker has errors of its own
        raise RunError(
            f"the tracker of report_to={config.run.report_to!r} did not start: {first_line(error)}; "
            "--report_to none trains without"
        ) from error


def tell_trackers(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Log `values`; after an error the trackers are told nothing more, and the log says so."""
    try:
        accelerator.log(dict(values), step=step)
    except Exception as error:
        _give_up(accelerator, error)


def end_trackers(accelerator: Accelerator) -> None:
    """End the trackers. The process group stays for the next run, which that of folds has."""
    try:
        for tracker in accelerator.trackers:
            tracker.finish()
    except Exception as error:
        _give_up(accelerator, error)


def _give_up(accelerator: Accelerator, error: Exception) -> None:
    accelerator.trackers = []
    logger.warning("the tracker failed and gets no more data; events.jsonl has all figures: %s", first_line(error))
