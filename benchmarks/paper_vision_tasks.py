"""The images of `paper_vision`: three tasks, each with a shift of style, of quality, or of both.

icon_group, icon_subgroup: flat drawings of things, told apart by the group that emojibase puts them in; shifted to the
    3D drawings of the things that are tested, a style that neither pretraining nor training sees, and to corrupted
    flat ones. From the npm packages of the tiny base's recipe (MIT, Apache-2.0, CC BY 4.0: `icons.PACKAGES`).
digits: handwritten ones, 8 x 8 enlarged, shifted to corrupted ones. From scikit-learn (BSD-3-Clause), a copy of the
    UCI repository's "Optical Recognition of Handwritten Digits" (CC BY 4.0).

Corruptions are the 15 of ImageNet-C (arXiv:1903.12261) by the package imagecorruptions (Apache-2.0), a set for each
severity. A thing is in one split only, with all its drawings.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flatlora_diffusion.ground.files import load_tensors, save_tensors
from flatlora_diffusion.ground.seeds import derive_seed
from samples.tiny_sdxl.build import flat_images
from samples.tiny_sdxl.recipe.icons import load_concepts
from samples.tiny_sdxl.recipe.judge import STYLES, Renders, collect_renders
from samples.tiny_sdxl.recipe.vae import to_pixels

SIZE = 64
TRAIN, VALIDATION, TEST = 480, 200, 300  # images, at most
SHARES = (0.6, 0.8)  # where validation and test begin among the things
OF_CORRUPTION = 12  # images of each corruption and severity
SEVERITIES = (1, 2, 3, 4, 5)
_LEAST = 12  # things in a class that counts
_SEED = 0

Images = np.ndarray[Any, np.dtype[np.uint8]]  # (rows, SIZE, SIZE, 3)


@dataclass(frozen=True)
class Pictures:
    """Images (rows, SIZE, SIZE, 3) and class numbers (rows,)."""

    images: Images
    labels: Tensor

    def rows(self, chosen: Tensor) -> tuple[tuple[Tensor], Tensor]:
        return (to_pixels(self.images[chosen.numpy()]),), self.labels[chosen]

    def parts(self, most: int | None) -> Sequence[Tensor]:
        return torch.arange(len(self.labels[:most])).split(64)


Splits = dict[str, Pictures]  # train, validation, test and what is shifted


def load_task(name: str, packages: Path, work: Path) -> Splits:
    """A task, made once and kept in `work`."""
    file = work / "vision" / f"{name}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        splits = _MADE[name](packages, work)
        splits |= corrupted(splits["test"], corruptions(packages))
        tensors = {f"{split} images": torch.from_numpy(one.images) for split, one in splits.items()}
        tensors |= {f"{split} labels": one.labels for split, one in splits.items()}
        save_tensors(file, tensors, {"splits": list(splits)})
    tensors, header = load_tensors(file)
    return {
        split: Pictures(tensors[f"{split} images"].numpy(), tensors[f"{split} labels"]) for split in header["splits"]
    }


def icons(packages: Path, work: Path, kind: str) -> Splits:
    concepts = load_concepts(work)
    classes = [str(getattr(concept, kind)) for concept in concepts]
    return icon_splits(classes, collect_renders(concepts, flat_images(concepts, work)))


def icon_splits(classes: Sequence[str], renders: Renders) -> Splits:
    """Things, of which `classes` has the class, in three parts; of the last the 3D drawings too."""
    sizes = Counter(classes)
    names = sorted(name for name, count in sizes.items() if count >= _LEAST)
    things = _shuffled([number for number, name in enumerate(classes) if name in names])
    ends = [0, *(round(share * len(things)) for share in SHARES), len(things)]
    is_3d = renders.styles == STYLES.index("fluent-3d")
    numbers = torch.tensor([names.index(name) if name in names else -1 for name in classes])

    def drawings(part: int, of_3d: bool, most: int) -> Pictures:
        chosen = torch.tensor(things[ends[part] : ends[part + 1]])
        rows = (torch.isin(renders.concepts, chosen) & (is_3d == of_3d)).nonzero().flatten().tolist()
        kept = torch.tensor(_shuffled(rows)[:most])
        return Pictures(renders.images[kept.numpy()], numbers[renders.concepts[kept]])

    return {
        "train": drawings(0, False, TRAIN),
        "validation": drawings(1, False, VALIDATION),
        "test": drawings(2, False, TEST),
        "3d": drawings(2, True, TEST),
    }


def digits(packages: Path, work: Path) -> Splits:
    table = np.loadtxt(packages / "sklearn" / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.uint8)
    order = _shuffled(list(range(len(table))))
    splits, first = {}, 0
    for name, count in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        rows = table[order[first : first + count]]
        splits[name] = Pictures(
            np.stack([_enlarged(row[:-1]) for row in rows]), torch.from_numpy(rows[:, -1].astype(int))
        )
        first += count
    return splits


def _enlarged(ink: Any) -> Images:
    """Dark on white, as the icons are; `ink` has 64 numbers from 0 to 16."""
    small = Image.fromarray((255 - ink.astype(float) * 255 / 16).astype(np.uint8).reshape(8, 8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB"))


def corrupted(clean: Pictures, each: Mapping[str, Callable[[Images, int], Images]]) -> Splits:
    """For each severity so many images of every corruption, from `clean` by turns."""
    splits = {}
    for severity in SEVERITIES:
        rows = list(islice(cycle(range(len(clean.labels))), OF_CORRUPTION * len(each)))
        images = [
            corrupt(clean.images[row], severity)
            for place, corrupt in enumerate(each.values())
            for row in rows[place :: len(each)]
        ]
        order = [row for place in range(len(each)) for row in rows[place :: len(each)]]
        splits[f"severity {severity}"] = Pictures(np.stack(images), clean.labels[order])
    return splits


def corruptions(packages: Path) -> dict[str, Callable[[Images, int], Images]]:
    """The 15 of ImageNet-C by name, each a function of image and severity.

    imagecorruptions is older than NumPy 2 and scikit-image 0.23: what these took away is given to it here.
    """
    sys.path.append(str(packages))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources says that it will go
        import imagecorruptions
        import numba
        from imagecorruptions import corruptions as inside
        from skimage.filters import gaussian as blurred

    def gaussian(image: Any, sigma: Any, multichannel: bool = False, **settings: Any) -> Any:
        return blurred(image, sigma, channel_axis=-1 if multichannel else None, **settings)

    inside.gaussian = gaussian
    np.float_ = np.float64  # type: ignore[attr-defined]
    seeded = numba.njit(lambda seed: np.random.seed(seed))

    def corrupt(image: Images, severity: int, name: str) -> Images:
        seed = derive_seed(_SEED, name, severity, int(image.sum())) % 2**32
        np.random.seed(seed)
        random.seed(seed)
        seeded(seed)
        changed: Images = imagecorruptions.corrupt(image, severity=severity, corruption_name=name)
        return changed

    return {name: partial(corrupt, name=name) for name in imagecorruptions.get_corruption_names()}


_MADE: dict[str, Callable[[Path, Path], Splits]] = {
    "icon_group": partial(icons, kind="group"),
    "icon_subgroup": partial(icons, kind="subgroup"),
    "digits": digits,
}
TASKS = tuple(_MADE)


def _shuffled(things: Sequence[int]) -> list[int]:
    return sorted(things, key=lambda thing: derive_seed(_SEED, "paper_vision", thing))
