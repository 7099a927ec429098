"""The second judge: it learns, it is saved whole, it ranks the names it is asked for, it knows no held-out render."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samples.tiny_sdxl.recipe import second_judge
from samples.tiny_sdxl.recipe.icons import Concept
from samples.tiny_sdxl.recipe.judge import Renders
from samples.tiny_sdxl.recipe.loop import Schedule
from samples.tiny_sdxl.recipe.second_judge import augment, load_second_judge, train_second_judge

COLOURS = ((230, 30, 30), (30, 200, 30), (30, 30, 230))
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><rect width="9" height="9" fill="rgb{}"/></svg>'
CONCEPTS = [
    Concept(f"1F60{place}", str(colour), (), 3, "", place, 1.0, {}, None, {"fxemoji": SVG.format(colour)})
    for place, colour in enumerate(COLOURS)
]


def test_it_learns_names_and_gives_their_scores_in_the_order_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_judge, "SCHEDULE", Schedule(steps=12, learning_rate=3e-3, warmup=2, ema=0.5))
    monkeypatch.setattr(second_judge, "BATCH", 12)
    monkeypatch.setattr(second_judge, "SETTLING", 4)
    images = np.stack([np.full((64, 64, 3), colour, np.uint8) for colour in COLOURS for _ in range(2)])
    renders = Renders(images, torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1] * 3))
    train_second_judge(CONCEPTS, renders, tmp_path, tmp_path / "judge2")
    rank = load_second_judge(tmp_path / "judge2")
    drawn = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    assert rank(drawn, CONCEPTS).argmax(dim=1).tolist() == [0, 1, 2]
    swapped = [CONCEPTS[2], CONCEPTS[0]]
    assert torch.equal(rank(drawn, swapped), rank(drawn, CONCEPTS)[:, [2, 0]])


def test_what_is_held_out_from_the_first_judge_is_held_out_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(second_judge, "SCHEDULE", Schedule(steps=2, learning_rate=1e-3))
    monkeypatch.setattr(second_judge, "SETTLING", 1)
    real = second_judge.to_pixels

    def watched(images: np.ndarray) -> torch.Tensor:
        seen.append(images)
        return real(images)

    monkeypatch.setattr(second_judge, "to_pixels", watched)
    monkeypatch.setattr(second_judge, "split_held_out", lambda _: (torch.tensor([0, 2]), torch.tensor([1])))
    images = np.stack([np.full((64, 64, 3), shade, np.uint8) for shade in (1, 2, 3)])
    train_second_judge(CONCEPTS, Renders(images, torch.tensor([0, 0, 1]), torch.zeros(3)), tmp_path, tmp_path / "two")
    shades = {int(image[0, 0, 0]) for batch in seen for image in batch}
    assert shades == {1, 3, *(colour[0] for colour in COLOURS)}, "and the drawings of the other sets are seen"


def test_its_augmentation_keeps_the_range_and_mirrors_only_what_may_be() -> None:
    pixels = torch.full((256, 3, 64, 64), 1.0)
    pixels[..., 8:24] = -1.0  # a dark bar at the left
    still, mirrored = (
        augment(pixels, torch.full((256,), may), torch.Generator().manual_seed(0)) for may in (False, True)
    )
    assert still.shape == pixels.shape
    assert (still.min(), still.max()) == (-1, 1)
    is_left = (still[..., :32].mean(dim=(1, 2, 3)) < still[..., 32:].mean(dim=(1, 2, 3))).float().mean()
    assert is_left > 0.95
    is_left = (mirrored[..., :32].mean(dim=(1, 2, 3)) < mirrored[..., 32:].mean(dim=(1, 2, 3))).float().mean()
    assert 0.35 < is_left < 0.65


def test_it_is_another_network_with_another_seed() -> None:
    model = second_judge.build_second_judge([replace(CONCEPTS[0], hexcode=str(code)) for code in range(7)])
    assert model.config.num_labels == 7
    assert model.config.model_type == "resnet"
    assert second_judge.SEED != 0
