"""The icons of `populations`: lists of things that the base knows and does not know, which share no icon.

    known 200    3D icons of the 200 things that the base knows best
    known 615    3D icons of the other things that it was trained on
    unknown      3D icons of things that it has never drawn: people, faces, hands, buildings, symbols, signs
    flat         flat icons that it was trained on; what a LoRA makes worse there is forgetting
    tuning       3D icons of known things, and `tuning flat`: strengths are chosen by these two

No word of a training icon is in a 3D icon's name. A second style has lists of its own, of the same kinds: icons with
outlines of a set that the base has never seen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from flatlora_diffusion.config import SAMPLES
from flatlora_diffusion.storage.rng import derive_seed
from samples.icons_3d.build import (
    HELD_OUT_SIZE,
    TRAINING,
    named_words,
    slug,
    split,
    take,
    write_evaluation_set,
    write_training_set,
)

if TYPE_CHECKING:
    from samples.tiny_sdxl.recipe.icons import Concept

KNOWN = 200
REPORTED = ("known 200", "known 615", "unknown", "flat")
TUNING, TUNING_FLAT = "tuning", "tuning flat"
MOST = {"known 200": 110, "known 615": 110, "unknown": 110, "flat": 100}
MOST_TUNING = {"known 200": 40, "known 615": 40, "flat": 40}
SECOND_STYLE = "streamline-emojis", "@iconify-json/streamline-emojis@1.2.4"  # CC-BY-4.0


@dataclass(frozen=True)
class Style:
    """The folder of training images of a style, and that of each list."""

    training: Path
    lists: Mapping[str, Path]


def style_3d(packages: Path, work: Path) -> Style:
    """The 23 3D icons that ship, and the 3D lists; npm packages are fetched into `packages`, lists made once."""
    folder = work / "icons-3d"
    if not _is_made(folder):
        from samples.tiny_sdxl.recipe.icons import choose_concepts, load_concepts

        concepts = load_concepts(packages)
        training, _ = split(choose_concepts(concepts, KNOWN))
        drawable = [concept for concept in concepts if concept.image_3d is not None]
        _write_lists(concepts, drawable, training, folder)
    return Style(SAMPLES / "icons_3d", _lists(folder))


def second_style(packages: Path, work: Path) -> Style:
    """23 icons with outlines and their lists; the flat icons are those of the first style."""
    folder = work / "icons-second-style"
    if not _is_made(folder):
        from samples.tiny_sdxl.recipe.icons import choose_concepts, drawn_by_another, load_concepts, render

        svgs = drawn_by_another(packages, *SECOND_STYLE)
        concepts = load_concepts(packages)
        pictures = _fresh(folder / "rendered")

        def outlined(concept: Concept) -> Concept:
            file = pictures / f"{concept.hexcode}.png"
            Image.fromarray(render(svgs[concept.hexcode], 2 * HELD_OUT_SIZE)).save(file)
            return replace(concept, image_3d=file)

        drawable = [outlined(concept) for concept in concepts if concept.hexcode in svgs]
        known = {concept.hexcode for concept in choose_concepts(concepts, KNOWN)}
        training = take([concept for concept in drawable if concept.hexcode in known], TRAINING, "second style")
        write_training_set(training, _fresh(folder / "training"))
        _write_lists(concepts, drawable, training, folder)
    return Style(folder / "training", _lists(folder))


def shares_a_word(concept: Concept, training: Sequence[Concept]) -> bool:
    """Whether the name has a word of a training icon's name."""
    words = {word for other in training for word in named_words(other.name)}
    return bool(named_words(concept.name) & words)


def write_flat(concepts: Sequence[Concept], folder: Path) -> None:
    """Flat icons in the styles that the base was trained on, each style in turn, and their metadata.jsonl."""
    from samples.tiny_sdxl.recipe.icons import FLAT_STYLES, render

    rows = []
    for place, concept in enumerate(concepts):
        style = FLAT_STYLES[place % len(FLAT_STYLES)]
        file = f"{slug(concept.name)}-{concept.hexcode.lower()}.png"
        Image.fromarray(render(concept.flat_svgs[style])).save(folder / file)
        rows.append(json.dumps({"file_name": file, "group": style, "text": f"a flat icon of {concept.name}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")


def _write_lists(
    concepts: Sequence[Concept], drawable: Sequence[Concept], training: Sequence[Concept], folder: Path
) -> None:
    from samples.tiny_sdxl.recipe.icons import choose_concepts, recognizable

    best = {concept.hexcode for concept in choose_concepts(list(concepts), KNOWN)}
    trained = {concept.hexcode for concept in recognizable(list(concepts))}
    rest = [concept for concept in _shuffled(drawable) if not shares_a_word(concept, training)]
    by_list = {
        "known 200": [concept for concept in rest if concept.hexcode in best],
        "known 615": [concept for concept in rest if concept.hexcode in trained - best],
        "unknown": [concept for concept in rest if concept.hexcode not in trained],
    }
    tuning: list[Concept] = []
    for name, candidates in by_list.items():
        most = min(MOST_TUNING.get(name, 0), len(candidates) // 3)
        tuning += candidates[:most]
        write_evaluation_set(candidates[most : most + MOST[name]], _fresh(folder / name))
    write_evaluation_set(tuning, _fresh(folder / TUNING))
    flat = _shuffled(choose_concepts(list(concepts), KNOWN))
    write_flat(flat[: MOST["flat"]], _fresh(folder / "flat"))
    write_flat(flat[MOST["flat"] :][: MOST_TUNING["flat"]], _fresh(folder / TUNING_FLAT))


def _shuffled(concepts: Sequence[Concept]) -> list[Concept]:
    return sorted(concepts, key=lambda concept: derive_seed(0, "populations", concept.hexcode))


def _lists(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in (*REPORTED, TUNING, TUNING_FLAT)}


def _is_made(folder: Path) -> bool:
    return all((path / "metadata.jsonl").is_file() for path in _lists(folder).values())


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
