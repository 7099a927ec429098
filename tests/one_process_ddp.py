"""A model in DistributedDataParallel, in a process group of this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

# PyTorch 2.13 can hang when a model is freed right after its step: gloo's thread frees the finished work under a lock
# and waits for the GIL, which the destructor has while it waits for that lock. So models live as long as the process.
_ALIVE: list[DistributedDataParallel] = []


@contextmanager
def in_ddp(model: nn.Module) -> Iterator[DistributedDataParallel]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    _ALIVE.append(DistributedDataParallel(model))
    try:
        yield _ALIVE[-1]
    finally:
        distributed.destroy_process_group()
