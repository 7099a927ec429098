"""How far each training image was learned, from its losses at fixed noise and timesteps along a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from flatlora_diffusion.storage.formatting import MINUS, MISSING

CONFIDENCE = 0.95
MARKED = 0.1  # at most this share of the images is marked at each end

Mark = Literal["", "least", "most"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ImageChange:
    """An image's loss along a run: the geometric mean over its draws, so that each timestep counts equally.

    Attributes:
        curve: the loss at each measured step.
        change: the relative change from the first to the last measured step, -0.2 for 20 % lower.
        mark: set if the change differs from the typical image's by more than the spread of the draws.
        caption_effect: the base's loss with the caption relative to its loss without, -0.2 for 20 % lower; None if it
            was not measured.
        has_doubtful_caption: whether the caption raises the base's loss by more than the spread of the draws.
    """

    name: str
    curve: tuple[float, ...]
    change: float
    mark: Mark = ""
    caption_effect: float | None = None
    has_doubtful_caption: bool = False


@dataclass(frozen=True)
class ImageChanges:
    """The images of a run or of several seeds, least learned first, and the measured steps."""

    steps: tuple[int, ...]
    images: tuple[ImageChange, ...]


def image_changes(runs: Sequence[Sequence[Mapping[str, Any]]]) -> ImageChanges | None:
    """Derive the changes from `image_losses` events.

    Args:
        runs: the events of each run, in order; runs of several seeds have the same images and draws, and are averaged.

    Returns:
        None unless two or more steps were measured in all runs.
    """
    by_step = [{event["step"]: event["losses"] for event in run} for run in runs]
    steps = sorted(set.intersection(*(set(run) for run in by_step))) if by_step else []
    if len(steps) < 2:
        return None
    names = [
        name for name in by_step[0][steps[0]] if _is_measured(name, [run[step] for run in by_step for step in steps])
    ]
    if not names:
        return None
    # (steps, images, draws): the mean over the runs
    logs = np.mean([[_logs(run[step], names) for step in steps] for run in by_step], axis=0)
    changes = logs[-1] - logs[0]
    marks = _marks(changes)
    effects = _caption_effects(runs[0], names)
    rows = [
        ImageChange(
            name,
            tuple(float(value) for value in np.exp(logs[:, index].mean(axis=1))),
            float(np.expm1(changes[index].mean())),
            marks[index],
            None if effects is None else float(np.expm1(effects[index].mean())),
            effects is not None and _differs(effects[index]) > 0,
        )
        for index, name in enumerate(names)
    ]
    return ImageChanges(tuple(steps), tuple(sorted(rows, key=lambda row: -row.change)))


EXPLANATION = (
    "The loss of each training picture at the same noise levels, least learned first. A picture is marked only if it "
    "differs from the typical picture by more than the spread of the draws. Learned least: see whether it is unlike "
    "the others. Learned most: see whether drawings copy it. A caption that fits lowers the base's loss; if it raises "
    "the loss, read it again: the LoRA learns a wrong caption too. A picture that looks like another is trained on as "
    "often as both together."
)


def change_text(change: float) -> str:
    """Format a relative change, such as `\N{MINUS SIGN}20 %`."""
    return f"{change:+.0%}".replace("-", MINUS).replace("%", " %")


def caption_text(effect: float | None) -> str:
    """Format the effect of a caption; an en dash if it was not measured."""
    return MISSING if effect is None else change_text(effect)


def highlights(images: Iterable[ImageChange]) -> dict[str, list[str]]:
    """Return the names of the marked images by the reason, without reasons that no image has."""
    reasons = {
        "Learned least": lambda image: image.mark == "least",
        "Learned most": lambda image: image.mark == "most",
        "Check the caption": lambda image: image.has_doubtful_caption,
    }
    images = list(images)
    found = {reason: [image.name for image in images if holds(image)] for reason, holds in reasons.items()}
    return {reason: list(dict.fromkeys(names)) for reason, names in found.items() if names}


def _is_measured(name: str, measurements: Sequence[Mapping[str, Sequence[float]]]) -> bool:
    """Whether all measurements have finite losses of the image."""
    return all(name in losses and bool(np.isfinite(losses[name]).all()) for losses in measurements)


def _logs(losses: Mapping[str, Sequence[float]], names: Sequence[str]) -> Array:
    """The logarithms of the losses, (images, draws)."""
    return np.log(np.maximum([losses[name] for name in names], np.finfo(float).tiny))


def _marks(changes: Array) -> list[Mark]:
    """Mark the images at both ends whose change, (images, draws), differs from the median's at the same draws."""
    deviations = changes - np.median(changes, axis=0)
    order = np.argsort(-changes.mean(axis=1), kind="stable")
    count = max(1, int(MARKED * len(order)))
    marks: list[Mark] = [""] * len(order)
    for index in order[:count]:
        marks[index] = "least" if _differs(deviations[index]) > 0 else ""
    for index in order[-count:]:
        marks[index] = "most" if _differs(deviations[index]) < 0 else marks[index]
    return marks


def _caption_effects(run: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Array | None:
    """The logarithm of the base's loss with the caption over that without, (images, draws)."""
    start = next((event for event in run if "without_caption" in event), None)
    if start is None or any(name not in start["without_caption"] for name in names):
        return None
    return _logs(start["losses"], names) - _logs(start["without_caption"], names)


def _differs(values: Array) -> int:
    """The sign of the mean over draws, 0 if its interval contains 0 or there is only one draw."""
    if len(values) < 2:
        return 0
    margin = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    mean = float(values.mean())
    return int(np.sign(mean)) if abs(mean) > margin else 0
