"""The vision benchmark on made-up images: how tasks are cut, what pretraining sees, and a study from its command."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

from benchmarks import paper_study_surface, paper_vision, paper_vision_base, paper_vision_tasks
from benchmarks.paper_vision_base import SCHEDULE, pretrained, word_targets
from benchmarks.paper_vision_tasks import SIZE, Images, Pictures, corrupted, digits, icon_splits
from flatlora_diffusion import LandscapeConfig
from samples.tiny_sdxl.recipe.judge import STYLES, Renders

THREE_D = STYLES.index("fluent-3d")
TINY = ViTConfig(image_size=64, patch_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)


def made_up(things: int) -> Renders:
    """Two flat drawings and a 3D one of each thing; all pixels of a drawing are its thing's number."""
    owners = torch.arange(things).repeat_interleave(3)
    images = np.broadcast_to(owners.numpy().astype(np.uint8)[:, None, None, None], (len(owners), SIZE, SIZE, 3))
    return Renders(images.copy(), owners, torch.tensor([0, 1, THREE_D] * things))


def test_a_thing_is_in_one_split_only_and_3d_is_only_tested() -> None:
    classes = ["cat"] * 20 + ["dog"] * 20 + ["rare"] * 3
    splits = icon_splits(classes, made_up(len(classes)))
    things = {name: set(one.images[:, 0, 0, 0].tolist()) for name, one in splits.items()}
    assert not things["train"] & things["validation"]
    assert not things["train"] & things["test"]
    assert not things["validation"] & things["test"]
    assert things["3d"] == things["test"]
    assert {name: len(one.labels) for name, one in splits.items()} == {
        "train": 48, "validation": 16, "test": 16, "3d": 8,
    }  # fmt: skip
    for one in splits.values():
        assert one.labels.tolist() == [int(thing >= 20) for thing in one.images[:, 0, 0, 0].tolist()]


def test_each_severity_has_as_many_images_of_each_corruption() -> None:
    clean = Pictures(np.arange(8, dtype=np.uint8)[:, None, None, None].repeat(3, -1), torch.arange(8))

    def darker(image: Images, severity: int) -> Images:
        return image

    def lighter(image: Images, severity: int) -> Images:
        return image + np.uint8(100 * (severity > 2))

    splits = corrupted(clean, {"darker": darker, "lighter": lighter})
    assert list(splits) == [f"severity {number}" for number in range(1, 6)]
    hardest = splits["severity 5"]
    values = hardest.images[:, 0, 0, 0]
    assert (values % 100 == hardest.labels.numpy()).all()
    assert Counter((values >= 100).tolist()) == {
        True: paper_vision_tasks.OF_CORRUPTION, False: paper_vision_tasks.OF_CORRUPTION,
    }  # fmt: skip


def test_digits_are_dark_on_white(tmp_path: Path) -> None:
    folder = tmp_path / "sklearn" / "datasets" / "data"
    folder.mkdir(parents=True)
    rows = [",".join(["0"] * 32 + ["16"] * 32 + [str(number % 10)]) for number in range(1000)]
    (folder / "digits.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    splits = digits(tmp_path, tmp_path)
    assert [len(splits[name].labels) for name in ("train", "validation", "test")] == [480, 200, 300]
    image = splits["test"].images[0]
    assert image.shape == (SIZE, SIZE, 3)
    assert (image[0, 0].tolist(), image[-1, 0].tolist()) == ([255, 255, 255], [0, 0, 0])


def test_words_are_shared_and_rare_ones_left_out() -> None:
    targets = word_targets([{"red", "cat"}, {"cat"}, {"cat", "grin"}, {"cat", "red"}, {"red"}, {"red"}, {"odd"}])
    assert targets.shape == (7, 3)
    assert targets.sum(1).tolist() == [1.0] * 7
    assert targets[0].tolist() == [0.5, 0.5, 0]
    assert targets[6].tolist() == [0, 0, 1]


def test_pretraining_sees_no_3d_drawing_and_is_done_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    renders = made_up(4)
    renders.images[renders.styles.numpy() == THREE_D] = 255
    concept = SimpleNamespace(name="red cat", tags=("pet",), group=3)
    seen: list[Any] = []

    def to_pixels(images: Images) -> torch.Tensor:
        seen.append(images)
        return torch.zeros(len(images), 3, SIZE, SIZE)

    monkeypatch.setattr(paper_vision_base, "load_concepts", lambda work: [concept] * 4)
    monkeypatch.setattr(paper_vision_base, "flat_images", lambda concepts, work: None)
    monkeypatch.setattr(paper_vision_base, "collect_renders", lambda concepts, flat: renders)
    monkeypatch.setattr(paper_vision_base, "to_pixels", to_pixels)
    monkeypatch.setattr(paper_vision_base, "CONFIG", TINY)
    folder = pretrained(tmp_path, replace(SCHEDULE, steps=2))
    assert len(seen) == 2
    assert max(int(images.max()) for images in seen) < 4
    assert pretrained(tmp_path) == folder
    assert ViTModel.from_pretrained(folder, add_pooling_layer=False).config.hidden_size == 16


def test_a_study_of_images_is_done_from_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paper_study_surface, "CONFIG", LandscapeConfig(surface_points=3, slice_directions=2))
    ViTModel(TINY, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    splits = {
        name: Pictures(rng.integers(0, 255, (6, SIZE, SIZE, 3), dtype=np.uint8), torch.arange(6) % 2)
        for name in ("train", "validation", "test")
    }
    monkeypatch.setitem(paper_vision_tasks._MADE, "digits", lambda *_: splits)
    monkeypatch.setattr(paper_vision_tasks, "corruptions", lambda packages: {"none": lambda image, severity: image})
    arguments = ["--packages", str(tmp_path), "--work", str(tmp_path), "--model", str(tmp_path / "model")]
    arguments += ["--result", str(tmp_path / "result.json"), "--surfaces", str(tmp_path / "fig6")]
    arguments += ["--tasks", "digits", "--arms", "lora", "flat", "--sweeps"]
    paper_vision.main([*arguments, "--trials", "1", "--steps", "1", "--seeds", "1"])
    table = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["tables"]["digits"]
    drawn = json.loads((tmp_path / "fig6" / "digits" / "flatness.json").read_text(encoding="utf-8"))
    assert set(drawn["losses"]) == {"LoRA", "Flat-LoRA"}
    assert set(table["lora"]["mean"]) >= {"test", "shifted", "severity 1", "severity 5", "rise"}
