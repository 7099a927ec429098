"""The shipped 3D icons: complete, disjoint, transparent, small, and captioned in one grammar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from flatlora_diffusion.data.dataset import load_samples
from samples.icons_3d.build import FOLDER, caption, slug

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
