"""What a run tells of its memory before it begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import psutil
import torch

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.sdxl.device import this_process

logger = logging.getLogger(__name__)


def tell_memory(config: TrainConfig, samples: Sequence[Sample]) -> None:
    """Log what the run needs of a GPU's memory and of the CPU's, and what is free; without it where that fails."""
    process = this_process()  # chooses this process's GPU: before, CUDA would start on the first one
    device = process.device
    if device.type != "cuda" or not process.is_main_process:
        return
    from flatlora_diffusion.memory.estimate import preflight_lines  # slow to import, and of no use on a CPU
    from flatlora_diffusion.memory.host import cpu_lines

    try:
        on_gpu = preflight_lines(config, torch.cuda.mem_get_info(device)[0])
        for lines in (on_gpu, cpu_lines(config, samples, psutil.virtual_memory().available)):
            logger.log(logging.WARNING if len(lines) > 1 else logging.INFO, "%s", "\n".join(lines))
    except Exception as error:  # it is told for information alone
        logger.warning("the memory that the run needs could not be estimated: %s", error)
