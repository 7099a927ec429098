"""On which device, in which precision and as which process something runs: each table of it, once."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import distributed

# By the names that settings have for them; "no" is mixed precision's word for none.
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Processes wait for the first one while it draws previews or uploads; PyTorch's 10 minutes would end them all.
LONGEST_WAIT = timedelta(hours=6)


def this_process() -> PartialState:
    """This process among those of the launcher, on its device: on the CPU if accelerate was told so.

    The first call starts the process group, if there is one, whose processes wait for each other up to LONGEST_WAIT.
    It ends with the program: one launch can start it only once, and may train again.
    """
    was_started = distributed.is_available() and distributed.is_initialized()
    # Accelerator looks whether it was told so, PartialState does not.
    process = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    if not was_started and distributed.is_available() and distributed.is_initialized():
        atexit.register(process.destroy_process_group)
    return process


@contextmanager
def one_training() -> Iterator[PartialState]:
    """This process while it trains. accelerate has one precision at a time; the next training may have another."""
    is_ours = AcceleratorState._shared_state == {}
    try:
        yield this_process()
    finally:
        if is_ours:
            AcceleratorState._reset_state()


def agreed(accelerator: Accelerator, reason: str | None) -> str | None:
    """The reason to stop of any process, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return reason
    asked = torch.tensor(float(reason is not None), device=accelerator.device)
    is_asked = float(accelerator.reduce(asked, "sum")) > 0
    return (reason or "another process") if is_asked else None
