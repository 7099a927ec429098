"""Places to train at: the devices of this machine, or those of a cluster. Each runs one command at a time.

All that a run needs is in its folder and its command, so a place needs no more than both.
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

LOCAL = "local"  # a cluster of this machine alone, which Ray begins and ends


class Places(NamedTuple):
    """`number` commands can run at once; `run` returns the exit code of one, whose messages go into a file."""

    number: int
    run: Callable[[Sequence[str], Path], int]


def check_places(workers: int | None, cluster: str | None) -> None:
    """Raises ConfigError for more workers than devices, and for a cluster without Ray."""
    if cluster is not None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError('--cluster needs the package ray: pip install "flatlora-diffusion[cluster]"')
    elif torch.cuda.is_available() and (workers or 1) > torch.cuda.device_count():
        raise ConfigError(
            f"workers={workers} is more than this machine has CUDA devices, {torch.cuda.device_count()}; give at most "
            "as many, or --cluster"
        )


@contextmanager
def places(workers: int | None, cluster: str | None) -> Iterator[Places]:
    """Those of the settings, while this is open."""
    if cluster is None:
        yield _on_devices(workers or 1)
    else:
        with _on_cluster(cluster, workers) as of_cluster:
            yield of_cluster


def _on_devices(count: int) -> Places:
    """A CUDA device each, or an equal share of the CPU's cores."""
    free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for index in range(count):
        free.put(_device(index, count))

    def run(command: Sequence[str], log: Path) -> int:
        device = free.get()
        try:
            return _ended(command, str(log), {**os.environ, QUIET_VARIABLE: "1", **device})
        finally:
            free.put(device)

    return Places(count, run)


def _device(index: int, count: int) -> dict[str, str]:
    """The variables that give a process its share of this machine."""
    if torch.cuda.is_available():
        known = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {"CUDA_VISIBLE_DEVICES": known.split(",")[index].strip() if known else str(index)}
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // count))}


def _ended(command: Sequence[str], log: str, environment: Mapping[str, str]) -> int:
    with open(log, "wb") as said:
        return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=said, check=False).returncode


@contextmanager
def _on_cluster(address: str, workers: int | None) -> Iterator[Places]:
    """Ray's, each with a GPU if the cluster has any; its machines share the folders and have this program."""
    ray: Any = importlib.import_module("ray")
    own = {"num_cpus": workers or os.cpu_count(), "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, **own)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"cluster={address!r} cannot be reached: {str(error).splitlines()[0]}") from error
    try:
        has = ray.cluster_resources()
        gpus = int(has.get("GPU", 0))
        train = ray.remote(num_cpus=1, num_gpus=int(gpus > 0), max_retries=0)(_task())
        start = partial(_ray_run, ray, train)
        yield Places(workers or gpus or int(has["CPU"]), start)
    finally:
        ray.shutdown()


def _ray_run(ray: Any, train: Any, command: Sequence[str], log: Path) -> int:
    python, *arguments = command
    assert python == sys.executable
    return int(ray.get(train.remote(arguments, str(log.resolve()), os.getcwd(), QUIET_VARIABLE)))


def _task() -> Callable[..., int]:
    """What Ray runs on a machine: by value, so that it need not find it in a module there."""

    def train(arguments: list[str], log: str, folder: str, quiet: str) -> int:
        import os
        import subprocess
        import sys

        with open(log, "wb") as said:
            return subprocess.run(
                [sys.executable, *arguments],
                cwd=folder,
                env={**os.environ, quiet: "1"},
                stdout=subprocess.DEVNULL,
                stderr=said,
                check=False,
            ).returncode

    return train
