"""Worker slots for parallel trainings: devices of this machine or of a Ray cluster, each with one command at a time.

A run needs only its folder and its command.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from flatlora_diffusion.config import QUIET_VARIABLE, ConfigError

LOCAL = "local"  # a Ray cluster on this machine, started and ended here


class WorkerSlots(NamedTuple):
    """`number` commands can run in parallel; `run` logs a command's messages to a file and returns its exit code."""

    number: int
    run: Callable[[Sequence[str], Path], int]


def check_workers(workers: int | None, cluster: str | None) -> None:
    """Raise ConfigError for more workers than devices, and for a cluster without Ray."""
    if cluster is not None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError('--cluster needs the package ray: pip install "flatlora-diffusion[cluster]"')
    elif torch.cuda.is_available() and (workers or 1) > torch.cuda.device_count():
        raise ConfigError(
            f"workers={workers} exceeds the {torch.cuda.device_count()} CUDA devices of this machine; give fewer, or "
            "--cluster"
        )


@contextmanager
def worker_slots(workers: int | None, cluster: str | None) -> Iterator[WorkerSlots]:
    """Open the worker slots of the settings."""
    if cluster is None:
        yield _device_slots(workers or 1)
    else:
        with _cluster_slots(cluster, workers) as slots:
            yield slots


def _device_slots(count: int) -> WorkerSlots:
    """Slots with a CUDA device each, or with an equal share of the CPU's cores."""
    free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for index in range(count):
        free.put(_device_variables(index, count))

    def run(command: Sequence[str], log: Path) -> int:
        device = free.get()
        try:
            return _exit_code(command, str(log), {**os.environ, QUIET_VARIABLE: "1", **device})
        finally:
            free.put(device)

    return WorkerSlots(count, run)


def _device_variables(index: int, count: int) -> dict[str, str]:
    """The environment variables that give a process its device, or its share of the cores."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index].strip() if visible else str(index)}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // count))}


def _exit_code(command: Sequence[str], log: str, environment: Mapping[str, str]) -> int:
    with open(log, "wb") as file:
        return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=file, check=False).returncode


@contextmanager
def _cluster_slots(address: str, workers: int | None) -> Iterator[WorkerSlots]:
    """Slots of a Ray cluster, each with a GPU if there is any; its machines share the folders and this program."""
    ray: Any = importlib.import_module("ray")
    options = {"num_cpus": workers or os.cpu_count(), "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, **options)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"cluster={address!r} cannot be reached: {str(error).splitlines()[0]}") from error
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        train = ray.remote(num_cpus=1, num_gpus=int(gpus > 0), max_retries=0)(_task())
        start = partial(_ray_run, ray, train)
        yield WorkerSlots(workers or gpus or int(resources["CPU"]), start)
    finally:
        ray.shutdown()


def _ray_run(ray: Any, train: Any, command: Sequence[str], log: Path) -> int:
    python, *arguments = command
    assert python == sys.executable
    return int(ray.get(train.remote(arguments, str(log.resolve()), os.getcwd(), QUIET_VARIABLE)))


def _task() -> Callable[..., int]:
    """The function that Ray runs on a machine, nested so that Ray serializes it by value instead of importing it."""

    def train(arguments: list[str], log: str, folder: str, quiet: str) -> int:
        import os
        import subprocess
        import sys

        with open(log, "wb") as file:
            return subprocess.run(
                [sys.executable, *arguments],
                cwd=folder,
                env={**os.environ, quiet: "1"},
                stdout=subprocess.DEVNULL,
                stderr=file,
                check=False,
            ).returncode

    return train
