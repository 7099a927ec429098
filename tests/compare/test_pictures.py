"""Pictures are drawn once, cached by all that they depend on, and independent of the others but for rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from flatlora_diffusion.compare import pictures as pictures_module
from flatlora_diffusion.compare.pictures import PictureGenerator
from flatlora_diffusion.families.sdxl.pipeline import Sdxl

KEYS = [("an icon of a fox", 0), ("an icon of a fox", 1), ("an icon of a cow", 0)]


def test_a_picture_is_a_function_of_prompt_and_seed_alone(sdxl: Sdxl, tmp_path: Path) -> None:
    together = PictureGenerator(sdxl, 32, tmp_path / "one", steps=2).generate(None, KEYS)
    alone = PictureGenerator(sdxl, 32, tmp_path / "two", steps=2).generate(None, KEYS[1:2])
    difference = np.asarray(ImageChops.difference(together[KEYS[1]], alone[KEYS[1]]))
    assert difference.max() <= 1, "other pictures of a batch change the rounding alone, by one of 255 levels"
    assert not _equal(together[KEYS[0]], together[KEYS[1]])


def test_prompts_are_read_as_in_training(sdxl: Sdxl, tmp_path: Path) -> None:
    plain, skipping = (
        PictureGenerator(replace(sdxl, clip_skip=skipped), 32, tmp_path, steps=2).generate(None, KEYS[:1])
        for skipped in (None, 1)
    )
    assert not _equal(plain[KEYS[0]], skipping[KEYS[0]])


def test_pictures_are_kept_and_only_the_missing_ones_drawn(
    sdxl: Sdxl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    real = pictures_module.generate_images

    def counting(sdxl: Sdxl, prompts: list[str], *rest: object, **more: object) -> list[Image.Image]:
        drawn.extend(prompts)
        return real(sdxl, prompts, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures_module, "generate_images", counting)
    generator = PictureGenerator(sdxl, 32, tmp_path, steps=1)
    first = generator.generate(None, KEYS[:2])
    again = PictureGenerator(sdxl, 32, tmp_path, steps=1).generate(None, KEYS)
    assert drawn == [prompt for prompt, _ in KEYS]
    assert _equal(first[KEYS[0]], again[KEYS[0]])
    assert all(file.is_file() for file in generator.files(None, KEYS))


def test_a_stop_loses_one_batch_at_most(sdxl: Sdxl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = pictures_module.generate_images, 0

    def stopping(*arguments: object, **more: object) -> list[Image.Image]:
        nonlocal drawn
        if drawn == 1:
            raise KeyboardInterrupt
        drawn += 1
        return real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures_module, "generate_images", stopping)
    monkeypatch.setattr(pictures_module, "_BATCH", 2)
    generator = PictureGenerator(sdxl, 32, tmp_path, steps=1)
    assert generator.passes(None, KEYS) == 3 * 2
    with pytest.raises(KeyboardInterrupt):
        generator.generate(None, KEYS)
    assert [file.is_file() for file in generator.files(None, KEYS)] == [True, True, False]
    assert generator.passes(None, KEYS) == 2


def test_lora_steps_guidance_and_base_have_files_of_their_own(sdxl: Sdxl, lora: Path, tmp_path: Path) -> None:
    generator, longer = PictureGenerator(sdxl, 32, tmp_path, steps=1), PictureGenerator(sdxl, 32, tmp_path, steps=2)
    guided = PictureGenerator(sdxl, 32, tmp_path, steps=1, guidance=2.5)
    names = {generator.files(lora, KEYS)[0], *(one.files(None, KEYS)[0] for one in (generator, longer, guided))}
    assert len(names) == 4
    before = generator.generate(None, KEYS[:1])[KEYS[0]]
    assert not _equal(before, generator.generate(lora, KEYS[:1])[KEYS[0]])
    assert not _equal(before, guided.generate(None, KEYS[:1])[KEYS[0]])
    with torch.no_grad():
        sdxl.denoiser.conv_in.weight.add_(0.1)
    assert PictureGenerator(sdxl, 32, tmp_path, steps=1).files(None, KEYS)[0] not in names, "another base"


def test_a_lora_is_drawn_at_any_strength_and_each_is_kept_for_itself(sdxl: Sdxl, lora: Path, tmp_path: Path) -> None:
    generator, key = PictureGenerator(sdxl, 32, tmp_path, steps=1), KEYS[0]
    base = generator.generate(None, [key])[key]
    none, half, full = (generator.generate(lora, [key], strength)[key] for strength in (0.0, 0.5, 1.0))
    assert _equal(none, base)
    assert not _equal(half, base)
    assert not _equal(half, full)
    assert _equal(full, generator.generate(lora, [key])[key])
    assert generator.passes(lora, [key], 0.5) == 0
    assert generator.passes(lora, [key], 1.5) == 2


def _equal(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None
