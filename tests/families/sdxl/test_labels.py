"""The tiny base is recognized by its sizes and named in every file of its LoRAs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layouts import adapted, as_diffusers_loads, factors, peft, saved
from safetensors import safe_open
from torch import Tensor

from flatlora_diffusion.adapter.delta import Update
from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import ModelConfig, TrainConfig
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.families.sdxl.labels import SDXL_LABELS, TINY_LABELS, labels_of
from flatlora_diffusion.families.sdxl.shapes import on_meta
from flatlora_diffusion.lora_files.kohya import kohya_tensors
from flatlora_diffusion.training.trainer import train


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base under another name, as of somebody who has copied it."""
    folder = tmp_path_factory.mktemp("bases") / "my-sdxl"
    shutil.copytree(base_path("tiny"), folder, ignore=shutil.ignore_patterns("judge", "recipe"))
    return folder


def tiny_lora() -> dict[str, dict[str, Update]]:
    unet = on_meta(ModelConfig(pretrained_model_name_or_path="tiny"), "unet")
    rng = torch.Generator().manual_seed(0)

    def update(layer: Any) -> Update:
        down, up = (
            torch.randn(4, layer.in_features, generator=rng),
            torch.randn(layer.out_features, 4, generator=rng),
        )
        return Update(down, up, 1.0)

    layers = {name: layer for name, layer in unet.named_modules() if name.endswith((".to_q", ".to_k", ".to_v"))}
    return {"unet": {name: update(layer) for name, layer in layers.items()}}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def test_a_family_is_told_by_sizes(base: Path, renamed: Path) -> None:
    for place, family in (("tiny", TINY_LABELS), (str(renamed), TINY_LABELS), (str(base), SDXL_LABELS)):
        assert labels_of(on_meta(ModelConfig(pretrained_model_name_or_path=place), "unet")) == family
    assert labels_of(on_meta(ModelConfig(pretrained_model_name_or_path="some/sdxl"), "unet")) == SDXL_LABELS


@pytest.mark.parametrize("place", ["tiny", "renamed"])
def test_a_run_on_the_tiny_base_names_it_in_all_its_files(
    renamed: Path, icons: Path, tmp_path: Path, place: str
) -> None:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": "tiny" if place == "tiny" else str(renamed),
        "instance_data_dir": str(icons),
        "instance_prompt": "an icon",
        "output_dir": str(tmp_path / "fox"),
        "max_train_steps": 1,
        "train_batch_size": 1,
        "resolution": 32,
        "seed": 0,
        "report_to": "none",
    }
    folder = train(TrainConfig.from_dict(settings)).parent
    said = metadata(folder / "fox.safetensors")
    assert (said["ss_base_model_version"], said["modelspec.architecture"]) == TINY_LABELS[1:3]
    assert json.loads((folder / "fox.json").read_text(encoding="utf-8"))["sd version"] == "Unknown"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "It is for the tiny base of flatlora-diffusion" in card
    assert "ComfyUI" not in card
    assert "A LoRA for the tiny base of flatlora-diffusion" in card
    assert "- stable-diffusion-xl" not in card


def test_inspect_says_that_no_other_tool_can_use_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(dict(kohya_tensors(tiny_lora())), tmp_path / "x.safetensors", ss_base_model_version="sdxl_base_v1-0")
    assert main(["inspect", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["base"] == TINY_LABELS.name
    for row in report["tools"]:
        if row["tool"] == "diffusers":
            assert (row["layers"], row["note"]) == (row["of"], "with the tiny base only")
        else:
            assert row["layers"] == 0
            assert row["note"] == "only diffusers supports its base, the tiny base of flatlora-diffusion"


@pytest.mark.parametrize("claimed", ["sdxl_base_v1-0", "flatlora_tiny", None])
def test_export_names_the_base_of_the_shapes_whatever_the_file_says(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, claimed: str | None
) -> None:
    said = {} if claimed is None else {"ss_base_model_version": claimed}
    tiny = saved(dict(kohya_tensors(tiny_lora())), tmp_path / "tiny.safetensors", **said)
    assert main(["export", str(tiny), "--layout", "both"]) == 0
    assert "tiny_kohya.safetensors is for the tiny base of flatlora-diffusion" in caplog.text
    written = metadata(tmp_path / "tiny_kohya.safetensors")
    assert (written["ss_base_model_version"], written["modelspec.architecture"]) == TINY_LABELS[1:3]
    assert metadata(tmp_path / "tiny_diffusers.safetensors").get("ss_base_model_version") != "sdxl_base_v1-0"
    caplog.clear()
    other = saved(peft(factors(adapted(base, ("to_q", "to_k"), ()))), tmp_path / "other.safetensors", **said)
    assert main(["export", str(other), "--base", str(base)]) == 0
    assert "tiny base" not in caplog.text
    assert metadata(tmp_path / "other_kohya.safetensors")["ss_base_model_version"] == "sdxl_base_v1-0"


def test_the_tiny_base_s_loras_still_load(tmp_path: Path) -> None:
    path = saved(dict(kohya_tensors(tiny_lora())), tmp_path / "x.safetensors")
    found = as_diffusers_loads(Path(base_path("tiny")), path)
    expected: dict[str, Tensor] = {
        f"unet.{name}": update.up @ update.down for name, update in tiny_lora()["unet"].items()
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value, rtol=1e-3, atol=1e-2)
