"""The factor that fp16's scaler multiplies the loss by: small gradients survive by it, large ones may overflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate import Accelerator

Found = TypeVar("Found")


def loss_scale(accelerator: Accelerator) -> float:
    """The factor of the next backward; 1 without a scaler."""
    return 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())


@contextmanager
def scale_put_back(accelerator: Accelerator) -> Iterator[None]:
    """Whatever scale is found while this is open, the run begins with its own, as one that looks for nothing does."""
    own = loss_scale(accelerator)
    try:
        yield
    finally:
        if loss_scale(accelerator) != own:
            accelerator.scaler.update(own)


def taken_finite(accelerator: Accelerator, take: Callable[[], Found], is_finite: Callable[[Found], bool]) -> Found:
    """What `take` finds from gradients; while it is not finite, again at half the scale, down to 1.

    The loop lowers the scale likewise, but leaves out the step. What is not finite at any scale is returned.
    """
    found = take()
    while not is_finite(found) and loss_scale(accelerator) > 1:
        accelerator.scaler.update(loss_scale(accelerator) / 2)
        found = take()
    return found
