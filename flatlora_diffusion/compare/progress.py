"""Runs measurements and drawings with one progress bar over their passes through the UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

_BAR_FORMAT = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed} elapsed, about {remaining} left"


@dataclass(frozen=True)
class WorkItem:
    """A measurement or drawing that passes `passes` samples through the UNet, 0 if its result is cached."""

    label: str
    passes: int
    run: Callable[[], object]


def run_items(denoiser: nn.Module, items: Sequence[WorkItem]) -> None:
    """Run the items that are not cached, with a progress bar that advances with every pass of the denoiser."""
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
                item.run()
        finally:
            hook.remove()
        bar.update(total - bar.n)
