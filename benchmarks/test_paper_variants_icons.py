"""The icons of a second style, from made-up drawings: split as the 3D icons are, and made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import paper_variants_icons
from benchmarks.paper_variants_icons import icons_of_second_style
from samples.icons_3d.build import named_words

recipe = pytest.importorskip("samples.tiny_sdxl.recipe.icons", reason="needs the extra `recipe`")

ANIMALS = ("fox", "owl", "cow", "cat", "dog", "pig", "hen", "bee", "ant", "rat", "bat", "elk")
NAMES = [*ANIMALS, *(f"{animal} face" for animal in ANIMALS), "apple", "bread", "lemon", "melon", "olive", "peach"]
UNDRAWN = {"FOX", "APPLE"}  # not there in the second style


def colour(place: int) -> tuple[int, int, int]:
    return (8 * place, 255 - 8 * place, 100)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for icons; all things are known, and each is a square of a colour of its own in the second style."""
    svgs, concepts = {}, []
    for place, name in enumerate(NAMES):
        code = name.upper()
        if code not in UNDRAWN:
            red, green, blue = colour(place)
            fill = f'<rect width="8" height="8" fill="rgb({red},{green},{blue})"/>'
            svgs[code] = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{fill}</svg>'
        flat: dict[str, Any] = dict.fromkeys(recipe.FLAT_STYLES, "")
        group = 3 if place < 2 * len(ANIMALS) else 4
        concepts.append(recipe.Concept(code, name, (), group, "animal", place, 1.0, flat, Path("3d.png")))
    monkeypatch.setattr(recipe, "load_concepts", lambda packages: concepts)
    monkeypatch.setattr(recipe, "drawn_by_another", lambda packages, name, package: svgs)
    monkeypatch.setattr(paper_variants_icons, "make_icon_sets", lambda packages, folder: {"flat": folder / "flat"})
    monkeypatch.setattr(paper_variants_icons, "TRAINING", 4)
    monkeypatch.setattr(paper_variants_icons, "SIZES", {"search": 5, "report": 7})
    return tmp_path


def test_a_second_style_is_drawn_and_split_so_that_no_list_knows_another(made_up: Path) -> None:
    icons = icons_of_second_style(made_up, made_up)
    training = {file.stem.replace("-", " ") for file in icons.training.glob("*.png")}
    names = {
        name: [json.loads(line)["name"] for line in (icons.lists[name] / "metadata.jsonl").read_text().splitlines()]
        for name in ("search", "report")
    }
    assert [len(training), *map(len, names.values())] == [4, 5, 7]
    assert not set(names["search"]) & set(names["report"])
    seen = {word for name in training for word in named_words(name)}
    assert not any(named_words(name) & seen for name in [*names["search"], *names["report"]])
    assert not {"fox", "apple"} & {*training, *names["search"], *names["report"]}
    assert icons.lists["flat"] == made_up / "icons" / "flat"
    assert icons.named == icons.lists["report"]
    for name in training:
        with Image.open(icons.training / f"{name.replace(' ', '-')}.png") as image:
            assert image.convert("RGB").getpixel((128, 128)) == colour(NAMES.index(name))


def test_the_icons_of_a_second_style_are_made_once(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = icons_of_second_style(made_up, made_up)
    monkeypatch.setattr(recipe, "render", lambda *_: pytest.fail("drawn twice"))
    assert icons_of_second_style(made_up, made_up) == first


def test_the_second_style_is_none_that_the_base_was_trained_on() -> None:
    known = {package for package, _ in recipe.PACKAGES.values()}
    assert paper_variants_icons.SECOND_STYLE[1] not in known
