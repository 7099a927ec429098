"""The title of a base, before and after loading."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from tiny_random_klein import save_tiny_random_klein

from flatlora_diffusion.config import INCLUDED_BASES, SDXL, TINY, TINY_KLEIN, ModelConfig
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.families.registry import base_line, base_title, family_of
from flatlora_diffusion.families.sdxl.loading import load_pipeline


def called(name: str) -> ModelConfig:
    return ModelConfig(pretrained_model_name_or_path=name)


@pytest.mark.parametrize("name", [TINY, base_path(TINY)])
def test_the_tiny_base_is_never_called_sdxl_and_the_flag_that_gives_another_is_named(name: str) -> None:
    assert base_title(called(name)) == "the tiny demo base, 64 pixels"
    assert base_line(called(name)).startswith("base: the tiny demo base, 64 pixels; ")
    assert "--pretrained_model_name_or_path" in base_line(called(name))


def test_the_tiny_klein_is_a_klein_by_name_and_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INCLUDED_BASES, TINY_KLEIN, tmp_path / "klein")
    assert family_of(called(TINY_KLEIN)).name == "FLUX.2 klein", "also without its weights"
    save_tiny_random_klein(tmp_path / "klein")
    for name in (TINY_KLEIN, str(tmp_path / "klein")):
        assert base_title(called(name)) == "the tiny klein base, 32 pixels"
        assert "--pretrained_model_name_or_path for FLUX.2 klein" in base_line(called(name))


def test_other_bases_have_their_name_and_the_size_that_their_files_tell(base: Path, tmp_path: Path) -> None:
    file, odd = tmp_path / "mine.safetensors", tmp_path / "odd"
    file.touch()
    (odd / "unet").mkdir(parents=True)
    titles = {str(base): f"{base}, 32 pixels", SDXL: f"{SDXL}, 1024 pixels", str(file): f"{file}, 1024 pixels"}
    for text in ("{", "[]", "{}"):  # told in full when it is loaded
        (odd / "unet" / "config.json").write_text(text)
        assert base_title(called(str(odd))) == str(odd)
    for name, title in {**titles, "someone/unknown": "someone/unknown", "no where": "no where"}.items():
        assert base_title(called(name)) == title
        assert base_line(called(name)) == f"base: {title}"


def test_a_loaded_copy_of_the_tiny_base_is_known_by_its_sizes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = tmp_path / "my-sdxl"
    shutil.copytree(base_path(TINY), copied, ignore=shutil.ignore_patterns("judge", "recipe"))
    with caplog.at_level(logging.INFO):
        load_pipeline(called(str(copied)), torch.device("cpu"), torch.float32)
    assert "the base is the tiny demo base, 64 pixels: epsilon (by its scheduler)" in caplog.messages
