"""The loss scale of fp16's scaler: it saves small gradients from underflow, and large ones may overflow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate import Accelerator

T = TypeVar("T")


def loss_scale(accelerator: Accelerator) -> float:
    """The factor of the next backward; 1 without a scaler."""
    return 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())


@contextmanager
def loss_scale_restored(accelerator: Accelerator) -> Iterator[None]:
    """Restore the loss scale at the end, so that the run starts with its usual scale."""
    before = loss_scale(accelerator)
    try:
        yield
    finally:
        if loss_scale(accelerator) != before:
            accelerator.scaler.update(before)


def compute_finite(accelerator: Accelerator, compute: Callable[[], T], is_finite: Callable[[T], bool]) -> T:
    """Repeat `compute` at half the loss scale, down to 1, until its result is finite; return the last result."""
    result = compute()
    while not is_finite(result) and loss_scale(accelerator) > 1:
        accelerator.scaler.update(loss_scale(accelerator) / 2)
        result = compute()
    return result
