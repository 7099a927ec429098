"""What is left to measure, counted before it is done: one bar over it says what goes on and how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

_LOOK = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed} gone, about {remaining} left"


@dataclass(frozen=True)
class Piece:
    """Something to measure or to draw: `passes` samples will go through the UNet, none if it is there already."""

    what: str
    passes: int
    do: Callable[[], object]


def do_pieces(unet: nn.Module, pieces: Sequence[Piece]) -> None:
    """Do what is left of `pieces`, with a bar that moves with every pass of the UNet."""
    left = [piece for piece in pieces if piece.passes]
    total = sum(piece.passes for piece in left)
    if not left:
        return
    with tqdm(total=total, bar_format=_LOOK, mininterval=0.5, smoothing=0.1) as bar:

        def count(module: nn.Module, arguments: Any, output: Any) -> None:
            bar.update(min(len(output[0]), total - bar.n))

        hook = unet.register_forward_hook(count)
        try:
            for piece in left:
                bar.set_description_str(piece.what)
                piece.do()
        finally:
            hook.remove()
        bar.update(total - bar.n)
