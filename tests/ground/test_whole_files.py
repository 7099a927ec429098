"""A file is written whole or not at all, and what is kept in one is made once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatlora_diffusion.ground.files import kept_tensors
from flatlora_diffusion.ground.whole_files import write_json, writing_whole


def test_a_file_that_cannot_be_written_is_as_it_was_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_json(file, {"rank": 4})

    def write_half() -> None:
        with writing_whole(file) as aside:
            aside.write_text("{")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert json.loads(file.read_text(encoding="utf-8")) == {"rank": 4}
    assert list(tmp_path.iterdir()) == [file]


def test_names_that_are_no_text_can_be_written_too(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", ["\udcff.png"])
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == ["\udcff.png"]


@pytest.mark.parametrize("is_kept", [False, True])
def test_tensors_are_made_once_where_they_are_kept(tmp_path: Path, is_kept: bool) -> None:
    path, made = tmp_path / "latent.safetensors" if is_kept else None, []

    def make() -> Mapping[str, Tensor]:
        made.append(True)
        return {"mean": torch.arange(3.0)}

    for _ in range(2):
        assert torch.equal(kept_tensors(path, make)["mean"], torch.arange(3.0))
    assert len(made) == (1 if is_kept else 2)
