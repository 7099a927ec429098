"""The form of a training: all settings, their bounds, and back again."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from app.forms.forms import DECIDED_BY_THE_APP, PRESETS, ConfigForm, base_choices, preset_settings
from app.forms.labels import HINTS, LABELS, with_labels
from flatlora_diffusion.config import (
    INCLUDED_BASES,
    KLEIN,
    SDXL,
    TINY,
    TINY_KLEIN,
    ConfigError,
    TrainConfig,
    help_of,
    setting_hints,
)


@pytest.fixture(scope="module")
def form() -> ConfigForm:
    return ConfigForm()


def test_labels_and_help_name_no_flags(form: ConfigForm) -> None:
    assert set(LABELS) == set(form.by_name)
    assert set(HINTS) < set(LABELS)
    labels = [part.label for part in form.by_name.values()]
    assert len(set(labels)) == len(labels)
    for name, part in form.by_name.items():
        assert not re.search(r"_|--", part.label), name
        assert "--" not in part.info, (name, part.info)


def test_every_setting_has_a_component_with_its_help_and_bounds(form: ConfigForm) -> None:
    assert {*form.by_name, *DECIDED_BY_THE_APP} == set(TrainConfig().to_dict())
    config = TrainConfig()
    hints = setting_hints()
    for section in dataclasses.fields(config):
        for item in dataclasses.fields(getattr(config, section.name)):
            if item.name in DECIDED_BY_THE_APP:
                continue
            info = form.by_name[item.name].info
            assert info.startswith(with_labels(HINTS.get(item.name, help_of(item, hints[item.name]))))
            for bound in (item.metadata["min"], item.metadata["max"]):
                assert bound is None or str(bound) in info


def test_the_base_is_chosen_from_a_list_or_typed(
    form: ConfigForm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    component = form.by_name["pretrained_model_name_or_path"]
    assert component.allow_custom_value
    monkeypatch.setitem(INCLUDED_BASES, TINY_KLEIN, tmp_path)
    assert [value for _, value in base_choices()] == [TINY, SDXL, KLEIN], "the tiny klein has no weights here"
    (tmp_path / "model_index.json").touch()
    assert [value for _, value in base_choices()] == [TINY, TINY_KLEIN, SDXL, KLEIN]
    for base in ("tiny_klein", "/somewhere/my base"):
        read = form.read(form.write({"pretrained_model_name_or_path": base}), "lora")
        assert read.model.pretrained_model_name_or_path == base


def test_a_quick_look_can_be_resumed_and_compared_on_its_way() -> None:
    settings = preset_settings("Quick look", {})
    assert settings["max_train_steps"] >= 2 * settings["checkpointing_steps"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_come_back_from_the_form_as_they_were(form: ConfigForm, preset: str) -> None:
    settings = preset_settings(preset, {"resolution": 96, "sigma": 0.07})
    read = form.read(form.write(settings), settings["method"]).to_dict()
    assert {name: read[name] for name in form.by_name} == {name: settings[name] for name in form.by_name}
    assert read["resolution"] == 96


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("rank", 0, "rank=0 is out of range"),
        ("train_batch_size", 2.5, "train_batch_size=2.5 must be a whole number"),
        ("sigma", "much", "sigma='much' must be a number"),
        ("resolution", "4", "resolution=4 is out of range"),
        ("lr_scheduler", "up", "lr_scheduler='up' is not one of"),
    ],
)
def test_a_wrong_value_is_one_sentence(form: ConfigForm, name: str, value: object, sentence: str) -> None:
    values = dict(zip(form.by_name, form.write({}), strict=True)) | {name: value}
    with pytest.raises(ConfigError, match=sentence):
        form.read(list(values.values()), "flat-lora")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rank=0 is out of range: it must be at least 1", "Rank = 0 is out of range: it must be at least 1"),
        ("pretrained_model_name_or_path='x' has no text_encoder_2", "Base model = 'x' has no text_encoder_2"),
        (
            "--use_8bit_adam is for --optimizer adamw; leave it out",
            "“8-bit Adam” is for “Optimizer” adamw; leave it out",
        ),
        (
            "--method sam has no sigma, but sigma=0.1 was given",
            "“Train” sam has no sigma, but Flat-LoRA sigma = 0.1 was given",
        ),
        ("train with a smaller checkpointing_steps", "train with a smaller “Steps between checkpoints”"),
        ("there is no file '/a/rank=2/--seed' there", "there is no file '/a/rank=2/--seed' there"),
        ("SDXL's own --resolution isn't a seed", "SDXL's own “Resolution” isn't a seed"),
        ("give --output_dir, or --data_dir", "give --output_dir, or --data_dir"),
    ],
)
def test_an_error_names_settings_as_the_form_does(text: str, told: str) -> None:
    """What is quoted is the user's; words that are also names of settings stay."""
    assert with_labels(text) == told
