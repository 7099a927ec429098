"""On which device, in which precision and as which process something runs: each table of it, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

# By the names that settings have for them; "no" is mixed precision's word for none.
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Processes wait for the first one while it draws previews or uploads; PyTorch's 10 minutes would end them all.
LONGEST_WAIT = timedelta(hours=6)


def this_process() -> PartialState:
    """This process among those of the launcher, on its device: on the CPU if accelerate was told so.

    The first call starts the process group, if there is one, whose processes wait for each other up to LONGEST_WAIT.
    """
    # Accelerator looks whether it was told so, PartialState does not.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)


@contextmanager
def one_launch() -> Iterator[PartialState]:
    """This process while its launch trains, one run or several; the process group ends with it."""
    process = this_process()
    try:
        yield process
    finally:
        process.destroy_process_group()


def agreed(accelerator: Accelerator, reason: str | None) -> str | None:
    """The reason to stop of any process, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return reason
    asked = torch.tensor(float(reason is not None), device=accelerator.device)
    is_asked = float(accelerator.reduce(asked, "sum")) > 0
    return (reason or "another process") if is_asked else None
