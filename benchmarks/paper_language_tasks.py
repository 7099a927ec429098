"""The texts of `paper_language`: four tasks whose texts come with packages, each with a shift that is natural.

emoji_group, emoji_subgroup: English names of emoji; shifted to their English tags and to names in other languages.
    From the npm package `emojibase-data` (MIT).
sentiment: tweets; shifted to reviews of products and films and to editorials. From vaderSentiment 0.5 (MIT).
library: what a function does, in its docstring; shifted to what a class is and what an error says. From eight
    libraries that are installed (BSD, Apache and alike).

A thing is in one split only, with all its texts.
"""

from __future__ import annotations

import ast
import json
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from flatlora_diffusion.ground.seeds import derive_seed
from flatlora_diffusion.ground.whole_files import write_json

TRAIN, VALIDATION, TEST = 480, 200, 300  # at most
LANGUAGES = ("de", "fr", "es")
LIBRARIES = ("torch", "numpy", "scipy", "pandas", "matplotlib", "PIL", "transformers", "gradio")
_LEAST = 12  # things in a subgroup that counts
_SEED = 0
_REVIEWS = {
    "amazonReviewSnippets": "product reviews",
    "movieReviewSnippets": "film reviews",
    "nytEditorial": "editorials",
}

Pairs = list[tuple[str, str]]  # text, class


@dataclass(frozen=True)
class Task:
    """Texts with their classes; `shifts` are further tests by name."""

    name: str
    train: Pairs
    validation: Pairs
    test: Pairs
    shifts: dict[str, Pairs]

    @property
    def classes(self) -> list[str]:
        return sorted({label for _, label in self.train})


def load_task(name: str, packages: Path, cache: Path) -> Task:
    """A task, read from `packages` once and kept in `cache`."""
    file = cache / f"{name}.json"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(_MADE[name](packages)))
    read = json.loads(file.read_text(encoding="utf-8"))
    pairs = {split: [(text, label) for text, label in read[split]] for split in ("train", "validation", "test")}
    return Task(
        name, **pairs, shifts={key: [(text, label) for text, label in rows] for key, rows in read["shifts"].items()}
    )


def emoji(packages: Path, kind: str) -> Task:
    def read(language: str) -> dict[str, dict[str, str]]:
        file = packages / "node_modules" / "emojibase-data" / language / "data.json"
        rows = [row for row in json.loads(file.read_text(encoding="utf-8")) if kind in row]
        return {row["hexcode"]: row for row in rows}

    english = read("en")
    sizes = Counter(row[kind] for row in english.values())
    things = [code for code, row in english.items() if sizes[row[kind]] >= _LEAST and row.get("tags")]
    train, validation, test = _split(things)

    def named(codes: list[str], rows: dict[str, dict[str, str]]) -> Pairs:
        return [(rows[code]["label"], str(english[code][kind])) for code in codes if code in rows]

    shifts = {"tags": [(" ".join(english[code]["tags"]), str(english[code][kind])) for code in test]}
    shifts |= {language: named(test, read(language)) for language in LANGUAGES}
    return Task(f"emoji_{kind}", named(train, english), named(validation, english), named(test, english), shifts)


def sentiment(packages: Path) -> Task:
    """Texts whose mean rating by people is beyond 0.5 on a scale from -4 to 4."""
    with zipfile.ZipFile(packages / "vaderSentiment-0.5.zip") as outer:
        inner = next(name for name in outer.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with outer.open(inner) as stream, tarfile.open(fileobj=stream) as archive:
            texts = {
                Path(member.name).name.split("_")[0]: content.read().decode("utf-8", "replace")
                for member in archive.getmembers()
                if member.name.endswith("_GroundTruth.txt") and (content := archive.extractfile(member))
            }

    def rated(text: str) -> dict[str, str]:
        rows = [line.split("\t", 2) for line in text.splitlines() if line.count("\t") >= 2]
        return {words: "good" if float(rating) > 0 else "bad" for _, rating, words in rows if abs(float(rating)) > 0.5}

    tweets = rated(texts["tweets"])
    train, validation, test = ([(text, tweets[text]) for text in part] for part in _split(list(tweets)))
    shifts = {}
    for file, name in _REVIEWS.items():
        rows = rated(next(text for key, text in texts.items() if key.startswith(file)))
        shifts[name] = [(text, rows[text]) for text in _shuffled(list(rows))[:TEST]]
    return Task("sentiment", train, validation, test, shifts)


def library(packages: Path) -> Task:
    """From which library a sentence is; sentences that name one, and those in two of them, are left out."""
    found: dict[str, dict[str, set[str]]] = {}  # kind -> text -> libraries
    for name in LIBRARIES:
        for kind, text in _sentences(name):
            found.setdefault(kind, {}).setdefault(text, set()).add(name)
    rows = {
        kind: {text: next(iter(names)) for text, names in texts.items() if len(names) == 1}
        for kind, texts in found.items()
    }
    train, validation, test = _split_evenly(_even(rows["function"], TRAIN + VALIDATION + TEST))
    shifts = {
        name: [pair for pairs in _even(rows[kind], TEST).values() for pair in pairs]
        for kind, name in (("class", "classes"), ("error", "errors"))
    }
    return Task("library", train, validation, test, shifts)


_MADE = {
    "emoji_group": lambda packages: emoji(packages, "group"),
    "emoji_subgroup": lambda packages: emoji(packages, "subgroup"),
    "sentiment": sentiment,
    "library": library,
}
TASKS = tuple(_MADE)


def _sentences(name: str) -> Iterator[tuple[str, str]]:
    """Kind and text of every sentence that a library says of a function or class of its, or in an error."""
    spec = find_spec(name)
    assert spec is not None, f"{name} is not installed"
    for path in sorted(
        path for folder in spec.submodule_search_locations or () for path in Path(folder).rglob("*.py")
    ):
        if "test" in path.as_posix().rpartition("site-packages")[2]:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for kind, text in _of_tree(tree):
            words = " ".join(text.split())
            if 4 <= len(words.split()) <= 40 and not re.search("|".join((*LIBRARIES, "pillow")), words, re.IGNORECASE):
                yield kind, words


def _of_tree(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = (ast.get_docstring(node) or "").split("\n\n")[0]
            yield "class" if isinstance(node, ast.ClassDef) else "function", first
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            said = node.exc.args[0]
            if isinstance(said, ast.Constant) and isinstance(said.value, str):
                yield "error", said.value


def _split(things: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and test, in the sizes above, or in proportion when there are fewer."""
    order = _shuffled(things)
    share = min(1.0, len(order) / (TRAIN + VALIDATION + TEST))
    ends = [round(TRAIN * share), round((TRAIN + VALIDATION) * share), round((TRAIN + VALIDATION + TEST) * share)]
    return order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] : ends[2]]


def _even(rows: dict[str, str], most: int) -> dict[str, Pairs]:
    """Of `rows`, text to class, as many of each class, by class."""
    classes = sorted(set(rows.values()))
    found: dict[str, Pairs] = {label: [] for label in classes}
    for text in _shuffled(rows):
        if len(found[rows[text]]) < most // len(classes):
            found[rows[text]].append((text, rows[text]))
    return found


def _split_evenly(classes: dict[str, Pairs]) -> tuple[Pairs, Pairs, Pairs]:
    """As `_split`, class by class: in the shuffled order rare ones come to their share later than others."""
    label_of = {text: label for pairs in classes.values() for text, label in pairs}
    parts = [_split([text for text, _ in pairs]) for pairs in classes.values()]
    train, validation, test = (
        [(text, label_of[text]) for text in _shuffled((text for split in parts for text in split[place]), "mixed")]
        for place in range(3)
    )
    return train, validation, test


def _shuffled(things: Iterable[str], *purpose: str) -> list[str]:
    return sorted(set(things), key=lambda thing: derive_seed(_SEED, "paper_language", *purpose, thing))
