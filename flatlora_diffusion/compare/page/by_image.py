"""Prepares the table of a comparison's training images for its page: how far each was learned."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatlora_diffusion.charts.sparkline import curve_limits, relative, sparkline
from flatlora_diffusion.compare.page.format import Result, Section, arm_name, chip, data_uri, look_of
from flatlora_diffusion.evaluation.image_changes import EXPLANATION, ImageChange, caption_text, change_text, highlights
from flatlora_diffusion.storage.formatting import figure

_DIGITS = 4


def images(result: Result, folder: Path) -> Section:
    """A row per training image, least learned first: thumbnail, loss before, and each arm's curve and change."""
    found = result.get("by_image") or {}  # comparisons of earlier versions have none
    changes: dict[str, list[ImageChange | None]] = {
        arm: [change and ImageChange(**change) for change in of_arm["images"]]
        for arm, of_arm in found.get("arms", {}).items()
    }
    cells = {arm: _cells(result, arm, changes) for arm in changes}
    rows = []
    for index, image in enumerate(found.get("images", [])):
        known = [change for of_arm in changes.values() if (change := of_arm[index]) is not None]
        row = _row(folder, image, known[0]) | {"cells": [cells[arm][index] for arm in cells]}
        rows.append((statistics.fmean(change.change for change in known), row))
    rows.sort(key=lambda pair: -pair[0])
    every = [change for of_arm in changes.values() for change in of_arm if change is not None]
    content = {
        "arms": [chip(result, arm) for arm in changes],
        "highlights": {reason: ", ".join(names) for reason, names in highlights(every).items()},
        "rows": [row for _, row in rows],
    }
    return Section("images", "By image", EXPLANATION, "images", content if rows else None)


def _row(folder: Path, image: Mapping[str, Any], change: ImageChange) -> dict[str, Any]:
    return {
        "name": image["name"],
        "caption": image["caption"],
        "picture": data_uri(folder, image["file"]),
        "looks_like": image["looks_like"],
        "caption_effect": caption_text(change.caption_effect),
        "is_doubtful": change.has_doubtful_caption,
        "before": figure(change.curve[0], _DIGITS),
    }


def _cells(result: Result, arm: str, changes: Mapping[str, Sequence[ImageChange | None]]) -> list[dict[str, Any]]:
    """The curve and change of each image in an arm; empty for an image that the arm held out."""
    name, colour = arm_name(result, arm), f"var(--{look_of(result, arm).name})"
    limits = curve_limits(change.curve for of_arm in changes.values() for change in of_arm if change is not None)
    steps = result["by_image"]["arms"][arm]["steps"]
    cells = []
    for change in changes[arm]:
        if change is None:
            cells.append({"arm": name, "after": "", "change": "", "chart": "", "mark": ""})
            continue
        text = change_text(change.change)
        chart = sparkline(steps, relative(change.curve), limits, colour, f"loss of {change.name}, {name}: {text}")
        after = figure(change.curve[-1], _DIGITS)
        cells.append({"arm": name, "after": after, "change": text, "chart": chart, "mark": change.mark})
    return cells
