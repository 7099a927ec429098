"""Devices, precisions and processes."""

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

from flatlora_diffusion.config import ConfigError

# By the names in the settings; "no" is accelerate's name for no mixed precision.
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Processes wait while the first one generates previews or uploads; PyTorch's timeout of 10 minutes is too short.
LONGEST_WAIT = timedelta(hours=6)


def this_process() -> PartialState:
    """Return the state of this process and its device, as set by accelerate's launcher.

    The first call starts the process group, if there are several processes. It ends with the program, because it can
    be started only once but serve several trainings.
    """
    was_started = distributed.is_available() and distributed.is_initialized()
    # PartialState ignores this variable, unlike Accelerator.
    process = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    if not was_started and distributed.is_available() and distributed.is_initialized():
        atexit.register(process.destroy_process_group)
    return process


@contextmanager
def one_training() -> Iterator[PartialState]:
    """Yield the state of this process and reset accelerate's precision afterwards, for the next training."""
    is_first = AcceleratorState._shared_state == {}
    try:
        yield this_process()
    finally:
        if is_first:
            AcceleratorState._reset_state()


def has_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bf16 itself; PyTorch emulates it on GPUs before the RTX 30 series, far slower."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def check_precision(setting: str, precision: str | None, device: torch.device) -> None:
    """Raise ConfigError if `device` only emulates the precision of `setting`."""
    if precision == "bf16" and not has_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"{setting}='bf16' is only emulated by {name}, which is older than the RTX 30 series; use --{setting} fp16"
        )


def any_process(accelerator: Accelerator, reason: str | None) -> str | None:
    """Return a reason to stop if any process has one, so that all processes stop after the same step."""
    if accelerator.num_processes == 1:
        return reason
    count = accelerator.reduce(torch.tensor(float(reason is not None), device=accelerator.device), "sum")
    return (reason or "another process") if float(count) > 0 else None
