"""The icons of `paper_variants`: the lists of `paper_icons`, and those of a second style, flat and with outlines.

The base was trained on every flat set of its recipe, so the second style is a set that it never saw. What is drawn in
it is split as the 3D icons are: no word of a training icon in any list, and no icon in two of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from benchmarks.paper_icons import drawn, make_icon_sets, shares_a_word, training_images
from benchmarks.paper_variants_bench import Icons
from flatlora_diffusion.data.images import HELDOUT_FOLDER
from samples.icons_3d.build import HELD_OUT_SIZE, TRAINING, take, write_evaluation_set, write_training_set

if TYPE_CHECKING:
    from samples.tiny_sdxl.recipe.icons import Concept

SECOND_STYLE = "streamline-emojis", "@iconify-json/streamline-emojis@1.2.4"  # CC-BY-4.0
SIZES = {"search": 80, "report": 150}


def icons_3d(packages: Path, work: Path) -> Icons:
    """The 3D icons; `packages` is the folder for the npm packages."""
    lists = make_icon_sets(packages, work / "icons")
    return Icons(training_images(), lists, training_images() / HELDOUT_FOLDER)


def icons_of_second_style(packages: Path, work: Path) -> Icons:
    """The same in the second style; what is to be kept are the same flat icons."""
    folder = work / "icons-second-style"
    lists = {name: folder / name for name in SIZES}
    if not all((path / "metadata.jsonl").is_file() for path in lists.values()):
        _write(packages, folder, lists)
    return Icons(
        folder / "training", lists | {"flat": make_icon_sets(packages, work / "icons")["flat"]}, lists["report"]
    )


def _write(packages: Path, folder: Path, lists: dict[str, Path]) -> None:
    from samples.tiny_sdxl.recipe.icons import choose_concepts, drawn_by_another, load_concepts, render

    svgs = drawn_by_another(packages, *SECOND_STYLE)
    concepts = load_concepts(packages)
    pictures = folder / "rendered"
    pictures.mkdir(parents=True, exist_ok=True)

    def of_style(concept: Concept) -> Concept:
        file = pictures / f"{concept.hexcode}.png"
        Image.fromarray(render(svgs[concept.hexcode], 2 * HELD_OUT_SIZE)).save(file)
        return replace(concept, image_3d=file)

    known = [concept for concept in choose_concepts(concepts, 200) if concept.hexcode in svgs]
    training = take(known, TRAINING, "second style")
    rest = drawn([c for c in concepts if c.hexcode in svgs and not shares_a_word(c, training)])
    (folder / "training").mkdir(exist_ok=True)
    write_training_set([of_style(concept) for concept in training], folder / "training")
    for name, size in SIZES.items():
        write_evaluation_set([of_style(concept) for concept in rest[:size]], lists[name])
        rest = rest[size:]
