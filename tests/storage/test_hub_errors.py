"""Error messages without access to the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from flatlora_diffusion.config import ConfigError, DataConfig, ModelConfig
from flatlora_diffusion.data.sources import load_hf_dataset
from flatlora_diffusion.evaluation.captioner import load_captioner
from flatlora_diffusion.evaluation.encoders import load_encoder
from flatlora_diffusion.families.sdxl.loading import load_pipeline
from flatlora_diffusion.families.sdxl.single_file import save_single_file
from flatlora_diffusion.storage.hub_errors import loading_failure

FOR_PROGRAMMERS = ("local_files_only", "=False", "True", "stacktrace", "snapshot", "OfflineMode", "pip install")


def load_base(config: ModelConfig) -> None:
    load_pipeline(config, torch.device("cpu"), torch.float32)


def load_data(name: str) -> None:
    pytest.importorskip("datasets")
    load_hf_dataset(DataConfig(dataset_name=name, instance_prompt="an icon"))


@pytest.mark.parametrize(
    "load",
    [
        lambda base: load_base(ModelConfig("some/model")),
        lambda base: load_base(ModelConfig(str(base), "some/model")),
        lambda base: load_encoder("some/model"),
        lambda base: load_captioner("some/model"),
        lambda base: load_data("some/model"),
    ],
    ids=["base", "vae", "encoder", "captioner", "dataset"],
)
def test_the_error_for_a_hub_id_without_download_has_no_advice_for_programmers(
    base: Path, load: Callable[[Path], None]
) -> None:
    with pytest.raises(ConfigError) as error:
        load(base)
    sentence = str(error.value)
    assert "'some/model'" in sentence
    assert "the hub cannot be reached while HF_HUB_OFFLINE is set" in sentence
    assert "give a folder" in sentence
    assert not [word for word in FOR_PROGRAMMERS if word in sentence]
    assert "\n" not in sentence


@pytest.mark.parametrize("place", ["/no where/at all", "./no/such/folder"])
def test_a_path_that_cannot_be_a_hub_id_is_a_missing_folder(base: Path, place: str) -> None:
    for load in (load_encoder, load_captioner, lambda name: load_base(ModelConfig(str(base), name))):
        with pytest.raises(ConfigError, match=re.escape(place)):
            load(place)


def test_the_error_for_a_single_file_without_configs_names_the_flag(base: Path, tmp_path: Path) -> None:
    file = save_single_file(StableDiffusionXLPipeline.from_pretrained(base), tmp_path / "mine.safetensors")
    with pytest.raises(ConfigError, match=r"not downloaded.*--single_file_config FOLDER") as error:
        load_base(ModelConfig(str(file)))
    assert not [word for word in FOR_PROGRAMMERS if word in str(error.value)]


def test_other_loading_errors_keep_their_first_line(tmp_path: Path) -> None:
    assert loading_failure(str(tmp_path), OSError("config.json is damaged.\nmore")) == "config.json is damaged"
    assert loading_failure("some/model", ValueError()) == "ValueError"
