"""What a benchmark's JSON says beside its figures: the date, the machine, its libraries, and what rates it has."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.turns import synchronize
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.versions import versions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_NUMBERS = 2**24  # 64 MiB of fp32, more than a cache holds


def save(file: Path, figures: dict[str, Any]) -> None:
    """Write `figures` with date, machine and versions, so that a stop later loses nothing."""
    machine = {"device": device_name(), "threads": torch.get_num_threads()}
    write_json(file, {"date": f"{datetime.date.today()}", **machine, "versions": versions(), **figures})


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def rates() -> dict[str, float]:
    """Bytes that are copied and normal numbers that are drawn in a second."""
    source, target = torch.ones(_NUMBERS, device=DEVICE), torch.empty(_NUMBERS, device=DEVICE)
    return {
        "bytes": 8 * _NUMBERS / seconds(lambda: target.copy_(source)),
        "draws": _NUMBERS / seconds(lambda: target.normal_()),
    }


def seconds(call: Callable[[], Any], times: int = 5) -> float:
    """The least that `call` takes, after one call to warm up."""
    least = float("inf")
    for _ in range(times + 1):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        least = min(least, time.perf_counter() - started)
    return least
