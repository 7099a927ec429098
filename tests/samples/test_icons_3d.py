"""The shipped 3D icons: complete, disjoint, transparent, small, and captioned in one grammar."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flatlora_diffusion.data.dataset import load_samples
from samples.icons_3d.build import FOLDER, caption, slug, split, take, with_article

HELD_OUT = FOLDER / "heldout"


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, str]]:
    lines = (HELD_OUT / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_trainer_reads_23_captioned_icons() -> None:
    found = load_samples(FOLDER)
    assert len(found.samples) == found.captioned == 23
    assert {(sample.width, sample.height) for sample in found.samples} == {(256, 256)}
    assert found.skipped == []
    for sample in found.samples:
        assert sample.caption == caption(Path(sample.id).stem.replace("-", " "))


def test_64_other_icons_are_held_out(held_out: list[dict[str, str]]) -> None:
    found = load_samples(HELD_OUT)
    assert len(found.samples) == found.captioned == 64
    assert {(sample.width, sample.height) for sample in found.samples} == {(128, 128)}
    assert [name for name, _ in found.skipped] == []
    assert len({row["name"] for row in held_out}) == len(held_out) == 64
    assert {row["file_name"] for row in held_out} == {sample.id for sample in found.samples}
    for row in held_out:
        assert set(row) == {"file_name", "name", "group", "text"}
        assert row["file_name"] == f"{slug(row['name'])}.png"
        assert row["text"] == caption(row["name"])
    assert len({row["group"] for row in held_out}) == 5


def test_held_out_names_share_no_word_with_training_names(held_out: list[dict[str, str]]) -> None:
    trained = {word for path in FOLDER.glob("*.png") for word in path.stem.split("-")}
    asked = {word for row in held_out for word in slug(row["name"]).split("-")}
    assert trained & asked == set()


def test_no_image_is_in_both_sets() -> None:
    trained, held = load_samples(FOLDER).samples, load_samples(HELD_OUT).samples
    assert len({sample.sha256 for sample in (*trained, *held)}) == 23 + 64


def test_32_prompts_ask_for_held_out_icons_only(held_out: list[dict[str, str]]) -> None:
    prompts = (HELD_OUT / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(prompts)) == len(prompts) == 32
    assert set(prompts) <= {row["text"] for row in held_out}


@pytest.mark.parametrize(("folder", "limit"), [(FOLDER, 1_500_000), (HELD_OUT, 1_000_000)])
def test_icons_keep_their_alpha_and_are_small(folder: Path, limit: int) -> None:
    paths = sorted(folder.glob("*.png"))
    for path in paths:
        with Image.open(path) as image:
            assert image.mode == "RGBA"
            assert image.getchannel("A").getextrema() == (0, 255), path.name
    assert sum(path.stat().st_size for path in paths) < limit


def test_licence_and_sources_are_stated() -> None:
    licence = (FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "MIT License" in licence
    assert "Copyright (c) Microsoft Corporation." in licence
    assert "@lobehub/fluent-emoji-3d" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wolf", "a wolf"),
        ("ant", "an ant"),
        ("ewe", "a ewe"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass done", "an hourglass done"),
        ("grapes", "grapes"),
        ("dress", "a dress"),
        ("octopus", "an octopus"),
        ("cooked rice", "cooked rice"),
        ("sheaf of rice", "a sheaf of rice"),
        ("ear of corn", "an ear of corn"),
        ("night with stars", "a night with stars"),
        ("meat on bone", "meat on bone"),
        ("mount fuji", "mount fuji"),
        ("woman\u2019s hat", "a woman\u2019s hat"),
        ("woman\u2019s clothes", "woman\u2019s clothes"),
    ],
)
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected
    assert caption(name) == f"a TOK icon of {expected}, in the style of TOK"


def test_slugs_are_ascii() -> None:
    assert [slug(name) for name in ("woman\u2019s hat", "piñata", "pool 8 ball", "mrs. claus")] == [
        "womans-hat",
        "pinata",
        "pool-8-ball",
        "mrs-claus",
    ]


@dataclass(frozen=True)
class FakeConcept:
    name: str
    group: int
    hexcode: str


@pytest.fixture
def concepts() -> list[Any]:
    groups = [3] * 70 + [4] * 60 + [5] * 20 + [6] * 20 + [7] * 30
    return [FakeConcept(f"thing{i} shared{i // 2}", group, f"{i:X}") for i, group in enumerate(groups)]


def test_each_group_gives_its_share(concepts: list[Any]) -> None:
    chosen = take(concepts, 23, "training")
    assert Counter(concept.group for concept in chosen) == {3: 8, 4: 7, 5: 2, 6: 2, 7: 4}
    assert chosen == [concept for concept in concepts if concept in chosen]


def test_the_draw_depends_on_its_purpose_and_not_on_the_order(concepts: list[Any]) -> None:
    assert set(take(concepts, 23, "training")) == set(take(concepts[::-1], 23, "training"))
    assert set(take(concepts, 23, "training")) != set(take(concepts, 23, "heldout"))


def test_split_keeps_words_apart(concepts: list[Any]) -> None:
    training, held_out = split(concepts)
    assert (len(training), len(held_out)) == (23, 64)
    words = {word for concept in training for word in concept.name.split()}
    assert not any(words & set(concept.name.split()) for concept in held_out)
