"""Log a run to TensorBoard, wandb or comet; their errors do not end the run, since events.jsonl has all values."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from accelerate import Accelerator

from flatlora_diffusion.config import RunError, TrainConfig
from flatlora_diffusion.storage.formatting import first_line
from flatlora_diffusion.storage.saved_config import portable

logger = logging.getLogger(__name__)


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the trackers of --report_to. Raises RunError if that fails."""
    values = {name: value for name, value in portable(config.to_dict()).items() if value is not None}
    try:
        accelerator.init_trackers("flatlora", config=values)
    except Exception as error:  # each tracker has its own errors
        raise RunError(
            f"the tracker of report_to={config.run.report_to!r} did not start: {first_line(error)}; use "
            "--report_to none to train without"
        ) from error


def log_to_trackers(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Log `values` to the trackers; after an error they are stopped with a warning."""
    try:
        accelerator.log(dict(values), step=step)
    except Exception as error:
        _stop_after(accelerator, error)


def end_trackers(accelerator: Accelerator) -> None:
    """End the trackers, but not the process group, which the next run of a launch needs."""
    try:
        for tracker in accelerator.trackers:
            tracker.finish()
    except Exception as error:
        _stop_after(accelerator, error)


def _stop_after(accelerator: Accelerator, error: Exception) -> None:
    accelerator.trackers = []
    logger.warning("the tracker failed and is stopped; events.jsonl has all values: %s", first_line(error))
