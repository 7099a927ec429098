"""Runs measurements and drawings with one progress bar over their passes through the denoiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

_BAR_FORMAT = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed} elapsed, about {remaining} left"


@dataclass(frozen=True)
class WorkItem:
    """A measurement or drawing that passes `passes` samples through the denoiser, 0 if its result is cached.

    `pictures` is the number of pictures that it draws, 0 for a measurement of losses.
    """

    label: str
    passes: int
    run: Callable[[], object]
    pictures: int = 0


def _ignore(item: WorkItem, seconds: float) -> None:
    pass


def run_items(
    denoiser: nn.Module, items: Sequence[WorkItem], on_done: Callable[[WorkItem, float], None] = _ignore
) -> None:
    """Run the items that are not cached, with a progress bar that advances with every pass of the denoiser.

    `on_done` is called with each item that has run and its seconds.
    """
    pending = [item for item in items if item.passes]
    total = sum(item.passes for item in pending)
    if not pending:
        return
    with tqdm(total=total, bar_format=_BAR_FORMAT, mininterval=0.5, smoothing=0.1) as bar:

        def count(module: nn.Module, arguments: Any, output: Any) -> None:
            bar.update(min(len(output[0]), total - bar.n))

        hook = denoiser.register_forward_hook(count)
        try:
            for item in pending:
                bar.set_description_str(item.label)
                start = time.perf_counter()
                item.run()
                on_done(item, time.perf_counter() - start)
        finally:
            hook.remove()
        bar.update(total - bar.n)
