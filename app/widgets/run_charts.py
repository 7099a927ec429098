"""Loss curves and samples of runs, each in the colour of its method."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import gradio as gr

from ..context import AppContext
from ..runs.runs import Run
from .loss_chart import loss_chart
from .run_cards import method_name
from .sample_strip import sample_strips
from .theme import NO_METHOD, SHADES

_MAX_POINTS = 300
_LOSS_TEXT = "The training loss should fall, then level out."
_PAIR_TEXT = "Both runs of a pair see the same images and noise, so their curves may overlap."


def loss_curves(context: AppContext, runs: list[Run]) -> gr.HTML:
    """The chart of all runs that have a loss, each in its method's colour; hidden without a loss."""
    losses = {run.name: smooth(context.runs.events(run.id).losses()) for run in runs}
    curves = {name: [(step + 1, loss) for step, loss in points] for name, points in losses.items()}
    text = f"{_LOSS_TEXT} {_PAIR_TEXT}" if len(runs) > 1 else _LOSS_TEXT
    chart = loss_chart(curves, run_colours(runs), "Loss, smoothed", text)
    return gr.HTML(chart, visible=bool(chart))


def run_colours(runs: list[Run]) -> dict[str, str]:
    """The colour of each run by its name: that of its method, in another shade for a second run of the method."""
    colours: dict[str, str] = {}
    for run in runs:
        shades = SHADES.get(method_name(run.method), (NO_METHOD,))
        free = [shade for shade in shades if shade not in colours.values()]
        colours.setdefault(run.name, (free or shades)[0])
    return colours


def smooth(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """(step, loss averaged over a tenth of the run), for at most _MAX_POINTS steps."""
    reach = max(1, len(losses) // 10) // 2
    sums = [0.0, *accumulate(loss for _, loss in losses)]
    every = -(-len(losses) // _MAX_POINTS) or 1
    means = []
    for place in range(0, len(losses), every):
        first, last = max(0, place - reach), min(len(losses), place + reach + 1)
        means.append((losses[place][0], (sums[last] - sums[first]) / (last - first)))
    return means


def samples(context: AppContext, runs: list[Run]) -> gr.HTML:
    """The previews of the runs over their steps; hidden without previews."""
    page = sample_strips(context, runs, run_colours(runs))
    return gr.HTML(page, visible=bool(page))
