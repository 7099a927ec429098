"""Draws compare.png: training images, pictures of the base and each arm above real images, and several strengths."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from PIL import Image

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.evaluator import RunEvaluator
from flatlora_diffusion.compare.pictures import read_picture
from flatlora_diffusion.compare.progress import WorkItem
from flatlora_diffusion.gallery.grid import Band, labelled_bands

STRENGTHS = (0.0, 0.5, 1.0, 1.5)
CELL, THUMBNAIL = 192, 96  # pixels at most
MAX_PROMPTS, MAX_THUMBNAILS = 8, 24
_BLANK = Image.new("RGB", (1, 1), "white")


def comparison_grid(runs: Sequence[PlannedRun], evaluator: RunEvaluator, captions: Collection[str]) -> Image.Image:
    """Draw the grid of `runs`, one of each arm; `captions` are the captions of the training images."""
    prompts = evaluator.prompts.style[:MAX_PROMPTS]
    models = _models_band(runs, evaluator, prompts)
    strengths = _strengths_band(runs[0], evaluator)
    width = max(models.width, strengths.width)
    caption = "; ".join(_caption_parts(runs, evaluator, prompts, captions))
    return labelled_bands([_training_band(evaluator, width), models, strengths], caption)


def grid_items(run: PlannedRun, evaluator: RunEvaluator) -> list[WorkItem]:
    """The pictures of the first arm's `run` at several strengths, which only the grid needs."""
    return evaluator.strength_items(run.arm.name, run.lora, _strength_prompts(evaluator), STRENGTHS)


def _training_band(evaluator: RunEvaluator, width: int) -> Band:
    images = evaluator.training[:MAX_THUMBNAILS]
    cell = min(THUMBNAIL, width // len(images) - 8)
    return Band([images], ["Trained on"], cell=cell)


def _models_band(runs: Sequence[PlannedRun], evaluator: RunEvaluator, prompts: Sequence[str]) -> Band:
    rows = {"Base": evaluator.pictures(None), **{run.arm.name: evaluator.pictures(run.lora) for run in runs}}
    images = [[read_picture(file) for file in files[: len(prompts)]] for files in rows.values()]
    labels = list(rows)
    if any(prompt in evaluator.heldout for prompt in prompts):
        images.append([evaluator.heldout.get(prompt, _BLANK) for prompt in prompts])
        labels.append("Real image")
    return Band(images, labels, [_heading(evaluator, prompt) for prompt in prompts], CELL)


def _strengths_band(run: PlannedRun, evaluator: RunEvaluator) -> Band:
    images, labels = [], []
    for prompt in _strength_prompts(evaluator):
        images += evaluator.pictures_at_strengths(run.lora, prompt, STRENGTHS)
        labels += [f"{_heading(evaluator, prompt)}: 0", *(f"{at:g}" for at in STRENGTHS[1:])]
    return Band([images], ["Strength"], labels, CELL)


def _strength_prompts(evaluator: RunEvaluator) -> Sequence[str]:
    """The prompts that are drawn at every strength: an even selection that fits side by side."""
    prompts, count = evaluator.prompts.style[:MAX_PROMPTS], MAX_PROMPTS // len(STRENGTHS)
    return prompts[:: max(1, len(prompts) // count)][:count]


def _heading(evaluator: RunEvaluator, prompt: str) -> str:
    return evaluator.names.get(prompt, prompt)


def _caption_parts(
    runs: Sequence[PlannedRun], evaluator: RunEvaluator, prompts: Sequence[str], captions: Collection[str]
) -> Iterator[str]:
    run, has_changes = runs[0], any(planned.arm.changes for planned in runs)
    if any(prompt in evaluator.names for prompt in prompts):
        yield f"prompts such as \N{LEFT DOUBLE QUOTATION MARK}{prompts[0]}\N{RIGHT DOUBLE QUOTATION MARK}"
    if not set(captions).intersection(prompts):
        yield "not trained on any of these prompts"
    exception = " except those named in a row" if has_changes else ""
    yield f"same seed and settings{exception}, {run.steps} steps, guidance {evaluator.prompts.guidance:g}"
    for count, total, noun in (
        (len(prompts), len(evaluator.prompts.style), "prompts"),
        (min(len(evaluator.training), MAX_THUMBNAILS), len(evaluator.training), "training images"),
    ):
        if count < total:
            yield f"{count} of {total} {noun}"
    yield f"last row: {run.arm.name} at several strengths, 0 is the base"
