"""compare.png, which tells the whole in one look: what was trained on; the same prompts and seeds by the base and each
arm, above the real images where there are any; and the base turning into the first arm as its strength rises.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from PIL import Image

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.evaluator import RunEvaluator
from flatlora_diffusion.compare.progress import Piece
from flatlora_diffusion.gallery.grid import Band, labelled_bands

STRENGTHS = (0.0, 0.5, 1.0, 1.5)
CELL, THUMBNAIL = 192, 96  # pixels at most
MOST_PROMPTS, MOST_THUMBNAILS = 8, 24  # as many as can be seen at once
_BLANK = Image.new("RGB", (1, 1), "white")


def poster(runs: Sequence[PlannedRun], evaluator: RunEvaluator, captions: Collection[str]) -> Image.Image:
    """The picture of `runs`, one of each arm; `captions` are those of the training images."""
    prompts = evaluator.prompts.style[:MOST_PROMPTS]
    models = _models(runs, evaluator, prompts)
    strengths = _strengths(runs[0], evaluator)
    width = max(models.width, strengths.width)
    caption = "; ".join(_said(runs, evaluator, prompts, captions))
    return labelled_bands([_trained_on(evaluator, width), models, strengths], caption)


def poster_pieces(run: PlannedRun, evaluator: RunEvaluator) -> list[Piece]:
    """What is to be drawn for it, beside the pictures of the prompts; `run` is the first arm's."""
    return evaluator.to_draw_at_strengths(run.arm.name, run.lora, _risen(evaluator), STRENGTHS)


def _trained_on(evaluator: RunEvaluator, width: int) -> Band:
    images = evaluator.training[:MOST_THUMBNAILS]
    cell = min(THUMBNAIL, width // len(images) - 8)
    return Band([images], ["Trained on"], cell=cell)


def _models(runs: Sequence[PlannedRun], evaluator: RunEvaluator, prompts: Sequence[str]) -> Band:
    seed = evaluator.prompts.seeds[0]
    rows = {"Base": evaluator.pictures(None, seed)}
    rows |= {run.arm.name: evaluator.pictures(run.lora, seed) for run in runs}
    images = [[_read(file) for file in files[: len(prompts)]] for files in rows.values()]
    labels = list(rows)
    if any(prompt in evaluator.heldout for prompt in prompts):
        images.append([evaluator.heldout.get(prompt, _BLANK) for prompt in prompts])
        labels.append("Real image")
    return Band(images, labels, [_heading(evaluator, prompt) for prompt in prompts], CELL)


def _strengths(run: PlannedRun, evaluator: RunEvaluator) -> Band:
    images, labels = [], []
    for prompt in _risen(evaluator):
        images += evaluator.at_strengths(run.lora, prompt, STRENGTHS)
        labels += [f"{_heading(evaluator, prompt)}: 0", *(f"{at:g}" for at in STRENGTHS[1:])]
    return Band([images], ["Strength"], labels, CELL)


def _risen(evaluator: RunEvaluator) -> Sequence[str]:
    """The prompts that are shown at every strength: evenly taken of those above, as many as stand side by side."""
    prompts, count = evaluator.prompts.style[:MOST_PROMPTS], MOST_PROMPTS // len(STRENGTHS)
    return prompts[:: max(1, len(prompts) // count)][:count]


def _heading(evaluator: RunEvaluator, prompt: str) -> str:
    return evaluator.names.get(prompt, prompt)


def _said(
    runs: Sequence[PlannedRun], evaluator: RunEvaluator, prompts: Sequence[str], captions: Collection[str]
) -> Iterator[str]:
    """What has to be known to read it, in parts of a sentence."""
    run, have_own = runs[0], any(one.arm.changes for one in runs)
    if any(prompt in evaluator.names for prompt in prompts):
        yield f"prompts such as \N{LEFT DOUBLE QUOTATION MARK}{prompts[0]}\N{RIGHT DOUBLE QUOTATION MARK}"
    if not set(captions).intersection(prompts):
        yield "none of these was trained on"
    alike = "same seed, and settings but for those that a row names" if have_own else "same seed and settings"
    yield f"{alike}, {run.steps} steps, guidance {evaluator.prompts.guidance:g}"
    for shown, of, what in (
        (len(prompts), len(evaluator.prompts.style), "prompts"),
        (min(len(evaluator.training), MOST_THUMBNAILS), len(evaluator.training), "training images"),
    ):
        if shown < of:
            yield f"{shown} of {of} {what}"
    yield f"the last row is {run.arm.name} at other strengths, 0 is the base"


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
