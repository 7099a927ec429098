"""The icons of `paper_text_to_image`: three disjoint lists of 3D icons never trained on, and flat icons to be kept.

search: settings are chosen by it; checkpoint: checkpoints are; report: every published figure. `flat` are the icons
that the base was trained on, in its own style: what a LoRA makes worse there is forgetting.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from flatlora_diffusion.config import SAMPLES
from flatlora_diffusion.ground.seeds import derive_seed
from samples.icons_3d.build import named_words, slug, split, write_evaluation_set

if TYPE_CHECKING:
    from samples.tiny_sdxl.recipe.icons import Concept

SEED = 0
SIZES = {"search": 200, "checkpoint": 200, "report": 400}
FLAT = 100


def make_icon_sets(work: Path, folder: Path) -> dict[str, Path]:
    """The folder of each list, made once; the npm packages are fetched into `work`."""
    sets = {name: folder / name for name in (*SIZES, "flat")}
    if all((path / "metadata.jsonl").is_file() for path in sets.values()):
        return sets
    from samples.tiny_sdxl.recipe.icons import choose_concepts, load_concepts

    concepts = load_concepts(work)
    known = choose_concepts(concepts, 200)
    training, _ = split(known)
    rest = drawn([c for c in concepts if c.image_3d is not None and not shares_a_word(c, training)])
    for name, size in SIZES.items():
        write_evaluation_set(rest[:size], _fresh(sets[name]))
        rest = rest[size:]
    _write_flat(drawn(known)[:FLAT], _fresh(sets["flat"]))
    return sets


def training_images() -> Path:
    """The 23 icons of the paper's experiment."""
    return SAMPLES / "icons_3d"


def _write_flat(concepts: Sequence[Concept], folder: Path) -> None:
    from samples.tiny_sdxl.recipe.icons import FLAT_STYLES, render

    rows = []
    for place, concept in enumerate(concepts):
        style = FLAT_STYLES[place % len(FLAT_STYLES)]
        file = f"{slug(concept.name)}-{concept.hexcode.lower()}.png"
        Image.fromarray(render(concept.flat_svgs[style])).save(folder / file)
        rows.append(json.dumps({"file_name": file, "group": style, "text": f"a flat icon of {concept.name}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")


def drawn(concepts: Sequence[Concept]) -> list[Concept]:
    return sorted(concepts, key=lambda concept: derive_seed(SEED, "paper_icons", concept.hexcode))


def shares_a_word(concept: Concept, training: Sequence[Concept]) -> bool:
    words = {word for other in training for word in named_words(other.name)}
    return bool(named_words(concept.name) & words)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
