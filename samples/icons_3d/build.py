"""Build the 3D icon samples: `python -m samples.icons_3d.build --work FOLDER`, with `--full FOLDER` all 3D icons.

The rule, with no picking by hand: of the 200 concepts that stage A of the tiny base knows, 23 are for training and 64
others are held out. Each emoji group gives its share (largest remainders); within a group the order is that of
`derive_seed(SEED, purpose, hexcode)`. A held-out name shares no word with a training name, so that `dog` does not test
what `dog face` taught. Needs npm and the `recipe` extra unless the packages are in the work folder.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from flatlora_diffusion.storage.rng import derive_seed

if TYPE_CHECKING:  # importing it at run time needs the `recipe` extra, which the functions below do not
    from samples.tiny_sdxl.recipe.icons import Concept

FOLDER = Path(__file__).parent
SEED = 0
KNOWN, TRAINING, HELD_OUT, PROMPTS = 200, 23, 64, 32  # concepts of the base, samples, held-out icons, prompts
TRAINING_SIZE, HELD_OUT_SIZE = 256, 128  # pixels

# Names that take no article beside the plurals: mass nouns, activities, adjectives and proper names.
NO_ARTICLE = {"bowling", "bread", "construction", "cooking", "custard", "dango", "foggy", "ice", "meat", "mount fuji"}
NO_ARTICLE |= {"oden", "rice", "sake", "spaghetti", "sushi"}
VOWEL_SOUND = re.compile(r"(?!ewe|eu|one|uni|use|uku)[aeiou]|hour|x-ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path.home() / ".cache" / "flatlora_diffusion" / "icons"
    parser.add_argument("--work", type=Path, default=cache, help="folder for the npm packages")
    parser.add_argument("--full", type=Path, help="write all 3D icons here instead of rebuilding the samples")
    args = parser.parse_args()

    from samples.tiny_sdxl.recipe.icons import choose_concepts, load_concepts

    concepts = load_concepts(args.work)
    if args.full is not None:
        icons = [concept for concept in concepts if concept.image_3d is not None]
        write_evaluation_set(icons, args.full)
        print(f"{len(icons)} icons in {args.full}")
        return
    training, held_out = split(choose_concepts(concepts, KNOWN))
    write_training_set(training, FOLDER)
    write_evaluation_set(held_out, FOLDER / "heldout")
    # In drawn order, not by group: the first few prompts are a fair sample too.
    asked = sorted(take(held_out, PROMPTS, "prompts"), key=partial(_draw, "prompts"))
    prompts = [caption(concept.name) for concept in asked]
    (FOLDER / "heldout" / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"{len(training)} training icons in {FOLDER}, {len(held_out)} held-out icons and {len(prompts)} prompts")


def split(concepts: Sequence[Concept]) -> tuple[list[Concept], list[Concept]]:
    """(training, held out) by the rule above."""
    training = take(concepts, TRAINING, "training")
    seen = {word for concept in training for word in named_words(concept.name)}
    return training, take([c for c in concepts if not seen & named_words(c.name)], HELD_OUT, "heldout")


def take(concepts: Sequence[Concept], count: int, purpose: str) -> list[Concept]:
    """`count` of the concepts, each emoji group in proportion, drawn by key; in the order of `concepts`."""
    sizes = Counter(concept.group for concept in concepts)
    shares = {group: count * size / len(concepts) for group, size in sorted(sizes.items())}
    places = {group: int(share) for group, share in shares.items()}
    by_remainder = sorted(shares, key=lambda group: places[group] - shares[group])
    for group in by_remainder[: count - sum(places.values())]:
        places[group] += 1
    drawn: set[str] = set()
    for group, number in places.items():
        members = [concept for concept in concepts if concept.group == group]
        drawn.update(concept.hexcode for concept in sorted(members, key=partial(_draw, purpose))[:number])
    return [concept for concept in concepts if concept.hexcode in drawn]


def caption(name: str) -> str:
    """The prompt of the paper's icon experiment: `a TOK icon of a dog, in the style of TOK`."""
    return f"a TOK icon of {with_article(name)}, in the style of TOK"


def with_article(name: str) -> str:
    """`a wolf`, `an ant`, `grapes`, `cooked rice`: the noun that decides stands before the first preposition."""
    phrase = re.split(r" (?:of|on|in|with|over|at|without) ", name)[0]
    noun = phrase.split()[-1]
    is_plural = noun.endswith("s") and not noun.endswith(("ss", "us"))
    if is_plural or noun in NO_ARTICLE or name in NO_ARTICLE:
        return name
    return f"{'an' if VOWEL_SOUND.match(name) else 'a'} {name}"


def slug(name: str) -> str:
    """The name as a file name: ASCII letters and digits joined by hyphens."""
    plain = unicodedata.normalize("NFKD", re.sub("[\u2019']", "", name)).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", plain.lower()))


def write_training_set(concepts: Sequence[Concept], folder: Path) -> None:
    """NAME.png with alpha and NAME.txt with the caption, in place of those that are there."""
    for old in (*folder.glob("*.png"), *folder.glob("*.txt")):
        old.unlink()
    for concept in concepts:
        _save_icon(concept, folder / f"{slug(concept.name)}.png", TRAINING_SIZE)
        text = caption(concept.name) + "\n"
        (folder / f"{slug(concept.name)}.txt").write_text(text, encoding="utf-8")


def write_evaluation_set(concepts: Sequence[Concept], folder: Path) -> None:
    """NAME.png with alpha, and metadata.jsonl with file_name, name, group and text (the caption) of each."""
    from samples.tiny_sdxl.recipe.icons import GROUPS

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    names = Counter(slug(concept.name) for concept in concepts)
    rows = []
    for concept in concepts:
        stem = slug(concept.name)
        file_name = f"{stem}.png" if names[stem] == 1 else f"{stem}-{concept.hexcode.lower()}.png"
        _save_icon(concept, folder / file_name, HELD_OUT_SIZE)
        group = GROUPS.get(concept.group, "people, smileys and symbols")
        row = {"file_name": file_name, "name": concept.name, "group": group, "text": caption(concept.name)}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")


def _save_icon(concept: Concept, path: Path, size: int) -> None:
    assert concept.image_3d is not None
    with Image.open(concept.image_3d) as file:
        icon = file.convert("RGBA")
    if icon.size != (size, size):
        icon = icon.resize((size, size), Image.Resampling.LANCZOS)
    visible = Image.new("RGBA", icon.size)  # colours that nobody sees only make the file larger
    visible.paste(icon, mask=icon.getchannel("A").point(lambda alpha: 255 if alpha else 0))
    visible.save(path, optimize=True)


def _draw(purpose: str, concept: Concept) -> int:
    return derive_seed(SEED, "icons_3d", purpose, concept.hexcode)


def named_words(name: str) -> set[str]:
    """The words by which two names are taken for the same thing."""
    return {word for word in slug(name).split("-") if len(word) > 2 and word not in ("and", "with", "over")}


if __name__ == "__main__":
    main()
