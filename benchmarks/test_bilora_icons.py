"""The 3D-Icons protocol: what is asked for, what is compared with what, and what the scores are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.bilora_icons import INSTANCES, PROMPTS, icon_scores
from flatlora_diffusion.config import SAMPLES
from flatlora_diffusion.evaluation.encoders import Encoder

LEVELS = [[10, 20, 30, 40, 50, 60], [70, 80, 90, 100, 110, 120]]  # of the images of each run


def at(angles: Sequence[float]) -> Tensor:
    """Unit vectors, (B, 2)."""
    return torch.stack([torch.tensor(angles).cos(), torch.tensor(angles).sin()], dim=1)


def gray(level: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (level, level, level))


# An image's vector is at the angle of its level in hundredths, a text's at that of its length.
ENCODER = Encoder(
    "by hand",
    lambda images: at([float(np.asarray(image)[0, 0, 0]) / 100 for image in images]),
    lambda texts: at([len(text) / 100 for text in texts]),
)


def test_each_run_paints_the_six_prompts_with_one_seed_and_scores_each_image_against_its_own_prompt() -> None:
    asked = []

    def paint(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        asked.append((tuple(prompts), tuple(seeds)))
        return [gray(level) for level in LEVELS[len(asked) - 1]]

    scores = icon_scores(paint, ENCODER, lambda images: list(PROMPTS), runs=2, first_seed=5)
    assert len(PROMPTS) == len(INSTANCES) == 6
    assert asked == [(PROMPTS, (5,) * 6), (PROMPTS, (6,) * 6)]
    angles = [[level / 100 - len(prompt) / 100 for level, prompt in zip(run, PROMPTS, strict=True)] for run in LEVELS]
    runs = [fmean(100 * float(torch.tensor(angle).cos()) for angle in run) for run in angles]
    assert scores["i2t"] == pytest.approx(fmean(runs), abs=1e-3)
    assert scores["i2t_std"] == pytest.approx(stdev(runs), abs=1e-3)
    assert scores["t2t"] == pytest.approx(100, abs=1e-3)  # each caption is its prompt


def test_without_a_captioner_and_of_a_single_run_there_is_one_score() -> None:
    assert set(icon_scores(lambda prompts, seeds: [gray(9)] * 6, ENCODER, runs=1)) == {"i2t"}


def test_the_preset_trains_on_the_words_that_the_prompts_use() -> None:
    said = json.loads((SAMPLES / "presets" / "bilora_icons.json").read_text(encoding="utf-8"))["instance_prompt"]
    start, _, end = said.partition(",")
    assert all(prompt.startswith(f"{start} of a ") and prompt.endswith(f",{end}") for prompt in PROMPTS)
