"""Collects how far the runs of a comparison learned each training image, for its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.data.dataset import Sample, SampleSet
from flatlora_diffusion.evaluation.image_changes import ImageChanges, image_changes
from flatlora_diffusion.storage.atomic_io import atomic_write

_FOLDER, _SIDE = "training_images", 96  # pixels


def by_image(
    runs: Sequence[PlannedRun], samples: Sequence[Sample], pictures: Sequence[Image.Image], out: Path
) -> dict[str, Any]:
    """Return the changes of each arm over its seeds, and the images with thumbnails saved below `out`.

    `pictures` are the square training images in the order of `samples`. Empty if no arm has measured losses by image.
    """
    measured: dict[str, ImageChanges] = {}
    for key in dict.fromkeys(planned.arm.key for planned in runs):
        of_arm = [planned for planned in runs if planned.arm.key == key]
        events = [
            [event for event in planned.run.image_losses() if event["step"] <= planned.last_step] for planned in of_arm
        ]
        if (changes := image_changes(events)) is not None:
            measured[key] = changes
    if not measured:
        return {}
    names = {image.name for changes in measured.values() for image in changes.images}
    twins = dict(SampleSet(list(samples), 0, []).duplicates())
    images = [
        {
            "name": sample.id,
            "caption": sample.caption,
            "file": _save_thumbnail(picture, out, index),
            "looks_like": twins.get(sample.id),
        }
        for index, (sample, picture) in enumerate(zip(samples, pictures, strict=True))
        if sample.id in names
    ]
    shown = [sample.id for sample in samples if sample.id in names]
    return {"images": images, "arms": {key: _as_json(changes, shown) for key, changes in measured.items()}}


def _as_json(changes: ImageChanges, names: Sequence[str]) -> dict[str, Any]:
    """The changes in the order of `names`; None for an image that was not measured."""
    by_name = {image.name: {**asdict(image), "curve": list(image.curve)} for image in changes.images}
    return {"steps": list(changes.steps), "images": [by_name.get(name) for name in names]}


def _save_thumbnail(picture: Image.Image, out: Path, index: int) -> str:
    """Save a thumbnail and return its path below `out`."""
    file = f"{_FOLDER}/{index}.png"
    (out / _FOLDER).mkdir(exist_ok=True)
    with atomic_write(out / file) as temporary:
        picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS).save(temporary, format="PNG")
    return file
