"""Log the memory estimates at the start of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import psutil
import torch

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.families.device import this_process

logger = logging.getLogger(__name__)


def log_memory(config: TrainConfig, samples: Sequence[Sample]) -> None:
    """Log the estimated and the free GPU and CPU memory; a failed estimate is only logged."""
    process = this_process()  # first, because it selects the GPU of this process
    device = process.device
    if device.type != "cuda" or not process.is_main_process:
        return
    from flatlora_diffusion.memory.estimate import preflight_lines  # slow to import, not needed on a CPU
    from flatlora_diffusion.memory.host import cpu_lines

    try:
        gpu_lines = preflight_lines(config, torch.cuda.mem_get_info(device)[0])
        for lines in (gpu_lines, cpu_lines(config, samples, psutil.virtual_memory().available)):
            logger.log(logging.WARNING if len(lines) > 1 else logging.INFO, "%s", "\n".join(lines))
    except Exception as error:  # the estimates are for information only
        logger.warning("memory estimate failed: %s", error)
