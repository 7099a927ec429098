"""One definition of the settings: defaults, bounds, JSON and command line agree."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from flatlora_diffusion.commands.command_line import _comparison
from flatlora_diffusion.commands.train_flags import COMPARE, parse_training
from flatlora_diffusion.config import (
    SAMPLES,
    CompareConfig,
    ConfigError,
    SettingError,
    TrainConfig,
    preset_file,
    setting_hints,
    settings_with,
    with_legacy_defaults,
)
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.storage.run_dir import RunDir

OTHER: dict[str, Any] = {
    "pretrained_model_name_or_path": "some/base",
    "instance_data_dir": "pictures",
    "instance_prompt": "a TOK icon",
    "resolution": 512,
    "center_crop": True,
    "image_interpolation_mode": "bicubic",
    "caption_dropout": 0.2,
    "rank": 16,
    "lora_alpha": 8.0,
    "method": "flat-lora",
    "sigma": 0.05,
    "sigma_schedule": "constant",
    "perturb_seed": 9,
    "perturb_per": "step",
    "perturb_draw": "full",
    "perturb_norm_every": 3,
    "train_batch_size": 1,
    "max_train_steps": 7,
    "learning_rate": 2e-4,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "seed": 11,
}

# Texts that no path is ever made of: prompts, colours, numbers in words, names of layers, columns, trackers, tokens.
NO_PLACES = {
    "image_column", "caption_column", "instance_prompt", "class_prompt", "background_color", "lora_target_modules",
    "lora_unet_blocks", "lora_block_ranks", "token_abstraction", "output_name", "validation_prompt", "report_to",
    "hub_model_id", "hub_token", "resume_from_checkpoint",
}  # fmt: skip


def test_every_text_setting_is_marked_as_a_path_or_listed_as_no_path() -> None:
    texts = {name for name, hint in setting_hints().items() if hint in (str, str | None)}
    assert texts == {*settings_with("path_kind"), *NO_PLACES}
    assert not NO_PLACES & set(settings_with("path_kind"))


def test_settings_are_selected_by_trait_and_an_unknown_trait_is_an_error() -> None:
    assert settings_with("is_secret") == ("hub_token",)
    assert settings_with("path_kind", "model", "run") == (
        "pretrained_model_name_or_path",
        "pretrained_vae_model_name_or_path",
        "dataset_name",
        "output_dir",
    )
    assert set(settings_with("path_kind")) - set(settings_with("is_path")) == set(settings_with("path_kind", "part"))
    with pytest.raises(KeyError, match="is_pathh"):
        settings_with("is_pathh")


def test_setting_names_are_unique_and_each_has_help() -> None:
    config = TrainConfig()
    settings = [item for section in fields(config) for item in fields(getattr(config, section.name))]
    assert len({item.name for item in settings}) == len(settings) == len(config.to_dict())
    assert all(item.metadata["help"] for item in settings)


def test_command_line_json_and_keywords_give_the_same_config(tmp_path: Path) -> None:
    expected = TrainConfig.from_dict(OTHER)
    flags: list[str] = []
    for name, value in OTHER.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    assert parse_training(flags)[0] == expected
    file = tmp_path / "config.json"
    file.write_text(json.dumps(expected.to_dict()), encoding="utf-8")
    assert parse_training(["--config", str(file)])[0] == expected


def test_flags_win_over_config_and_config_over_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"rank": 2, "learning_rate": 0.5}), encoding="utf-8")
    config = parse_training(["--preset", "paper", "--config", str(file), "--learning_rate", "0.25"])[0]
    assert config.adapter.rank == 2
    assert config.optim.learning_rate == 0.25
    assert config.optim.max_train_steps == 500
    assert config.perturb.perturb_per == "step"


def test_a_saved_config_of_an_earlier_version_resumes_with_full_noise(tmp_path: Path) -> None:
    """It lacks the setting, and its run drew every entry of eps, whatever the default has become."""
    earlier = TrainConfig.from_dict({"seed": 5, "perturb_draw": "full", "perturb_norm_every": 1})
    saved = earlier.to_dict()
    for newer in ("perturb_draw", "perturb_norm_every", "rho_rise", "rho", "bar_strength"):
        del saved[newer]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(saved), encoding="utf-8")
    assert TrainConfig().updated_from(file) == TrainConfig.from_dict(saved) == earlier
    assert parse_training(["--config", str(file)])[0].perturb == earlier.perturb
    resumed = parse_training(["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"])[0]
    assert resumed.perturb == earlier.perturb
    assert with_legacy_defaults(saved)["perturb_draw"] == RunDir(tmp_path).config()["perturb_draw"] == "full"
    assert with_legacy_defaults({**saved, "perturb_draw": "low_rank"})["perturb_draw"] == "low_rank"
    file.write_text(json.dumps({"seed": 5, "sigma": 0.05}), encoding="utf-8")
    new = TrainConfig().updated_from(file).perturb
    assert (new.perturb_draw, new.perturb_norm_every) == ("low_rank", 10), "what is no saved config has the defaults"


def test_sam_calibrates_rho_unless_rho_is_given() -> None:
    calibrated, given = TrainConfig.from_dict({"method": "sam"}), TrainConfig.from_dict({"method": "sam", "rho": 0.1})
    assert calibrated.perturb.target_loss_increase == 0.25
    assert (given.perturb.target_loss_increase, given.perturb.effective_rho) == (0, 0.1)
    assert TrainConfig.from_dict({"method": "bi-lora"}).perturb.target_loss_increase == 0


UNREAD = {
    "--method lora --perturb_noise iid": "--method lora .*perturb_noise=iid.*--method flat-lora",
    "--method LoRA --sigma-schedule=constant": "--method lora has no sigma_schedule",
    "--perturb_per step --method sam": "--method sam has no perturb_per",
    "--method lora-sam --perturb_draw full": "--method lora-sam has no perturb_draw",
    "--method bi-lora --perturb_norm_every 10": "--method bi-lora has no perturb_norm_every, but",
    "--method nbar --perturb_seed 0": "--method nbar has no perturb_seed",
    "--sigma_schedule constant --sigma_ramp_steps 5": "--sigma_schedule constant has no ramp, but sigma_ramp_steps=5",
}


@pytest.mark.parametrize("line", UNREAD)
def test_a_flag_that_the_method_or_schedule_does_not_use_is_an_error(line: str) -> None:
    with pytest.raises(ConfigError, match=UNREAD[line]):
        parse_training(line.split())


def test_a_comparison_accepts_settings_of_the_methods_of_its_arms(icons: Path) -> None:
    of_noise = [f"--preset quality {flags}" for flags in ("--sigma 0.2", "--perturb_noise iid")]
    for line in (*UNREAD, *of_noise):
        arguments = [*line.split(), "--instance_data_dir", str(icons)]
        config, _ = _comparison(arguments, COMPARE, (), CompareConfig())
        assert config.data.instance_data_dir == str(icons)
    assert config.adapter.rank == 16


def test_settings_of_other_methods_in_a_preset_file_or_saved_run_are_ignored(tmp_path: Path) -> None:
    """What is given beside it is, if the method that they have does not read it."""
    others = {"perturb_noise": "iid", "sigma_schedule": "constant", "sigma_ramp_steps": 3, "perturb_per": "step"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TrainConfig.from_dict(others).to_dict()), encoding="utf-8")
    resumed = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
    taken_back = ["--config", str(file), "--sigma", "None", "--sigma_ramp_steps", "None"]
    for source in (["--preset", "paper"], ["--config", str(file)], resumed, taken_back):
        assert parse_training([*source, "--method", "sam"])[0].perturb.method == "sam"
        assert parse_training([*source, "--sigma_schedule", "constant"])[0].perturb.sigma_schedule == "constant"
    file.write_text(json.dumps(TrainConfig.from_dict({"method": "lora"}).to_dict()), encoding="utf-8")
    for source, method in ((["--config", str(file)], "lora"), (resumed, "lora"), (["--preset", "quality"], "lora")):
        with pytest.raises(ConfigError, match=f"--method {method} has no perturb_noise"):
            parse_training([*source, "--perturb_noise", "iid"])


def test_a_preset_s_method_ignores_settings_of_other_methods_in_saved_runs_but_not_in_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    quality = ["--preset", "quality"]
    resumed = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
    flat = ["--method", "flat-lora"]
    file.write_text(json.dumps(TrainConfig.from_dict({"sigma": 0.2}).to_dict()), encoding="utf-8")
    assert parse_training([*quality, *resumed])[0].perturb.method == "lora"
    again = parse_training([*quality, *flat, "--sigma", "0.2", *resumed])[0].perturb
    assert (again.method, again.sigma) == ("flat-lora", 0.2)
    file.write_text(json.dumps({"sigma": 0.2}), encoding="utf-8")
    of_file = [*quality, "--config", str(file)]
    assert parse_training([*of_file, *flat])[0].perturb.sigma == 0.2
    assert parse_training([*of_file, "--method", "lora"])[0].perturb.sigma is None
    with pytest.raises(ConfigError, match="--method lora has no sigma"):
        parse_training(of_file)


@pytest.mark.parametrize("flags", [["--method", "lora"], ["--method=LoRA"]])
def test_plain_lora_drops_a_sigma_that_came_from_a_preset_or_a_file(tmp_path: Path, flags: list[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TrainConfig.from_dict({"sigma": 0.05}).to_dict()), encoding="utf-8")
    for source in (["--preset", "paper"], ["--config", str(file)]):
        assert parse_training([*source, *flags, "--output_name", "sigma"])[0].perturb.effective_sigma == 0
        assert parse_training([*source, "--method", "flat-lora"])[0].perturb.effective_sigma > 0
        with pytest.raises(ConfigError, match=r"sigma=0\.1 was given"):
            parse_training([*source, *flags, "--sigma", "0.1"])


def test_rho_rise_overrides_the_rho_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TrainConfig.from_dict({"method": "sam", "rho": 0.05}).to_dict()), encoding="utf-8")
    assert parse_training(["--config", str(file), "--rho_rise", "0.2"])[0].perturb.target_loss_increase == 0.2
    assert (
        parse_training(["--config", str(file), "--rho_rise", "0.2", "--rho", "0.1"])[0].perturb.target_loss_increase
        == 0
    )


@pytest.mark.parametrize(
    ("flags", "prompts"),
    [
        (["--validation_prompt", "a fox"], ["a fox"]),
        (["--validation_prompt=a fox"], ["a fox"]),
        (
            ["--validation_prompt", "a fox", "--rank=2", "--validation-prompt=an owl, asleep"],
            ["a fox", "an owl, asleep"],
        ),
        (["--validation_prompt", "a fox\n\n an owl \na fox"], ["a fox", "an owl"]),
        (["--validation_prompt", ""], [""]),
        ([], []),
    ],
)
def test_a_run_has_one_preview_prompt_or_several(tmp_path: Path, flags: list[str], prompts: list[str]) -> None:
    config = parse_training(["--preset", "demo", *flags])[0]
    assert config.run.preview_prompts == prompts
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    assert parse_training(["--config", str(file)])[0].run.preview_prompts == prompts
    assert parse_training(["--config", str(file), "--validation_prompt", "a key"])[0].run.preview_prompts == ["a key"]


def test_the_klein_preset_trains_klein_base_with_settings_that_it_supports() -> None:
    config = parse_training(["--preset", "klein"])[0]
    assert config.model.pretrained_model_name_or_path == "black-forest-labs/FLUX.2-klein-base-4B"
    family_of(config.model).check_settings(config)


def test_the_epochs_flag_overrides_steps_of_a_preset_but_not_the_steps_flag() -> None:
    flags = ["--preset", "paper", "--num-train-epochs=3"]
    assert parse_training(flags)[0].optim.max_train_steps is None
    assert parse_training([*flags, "--max_train_steps=7"])[0].optim.max_train_steps == 7


def test_the_paper_preset_is_the_papers_sdxl_setting() -> None:
    config = TrainConfig().updated_from(preset_file("paper"))
    assert (config.adapter.rank, config.adapter.lora_alpha) == (4, 4)
    assert (config.optim.max_train_steps, config.optim.train_batch_size) == (500, 1)
    assert (config.optim.learning_rate, config.optim.lr_scheduler) == (1e-4, "constant")
    assert (config.perturb.effective_sigma, config.perturb.perturb_per) == (0.1, "step")


@pytest.mark.parametrize("preset", ["paper", "bilora_icons", None])
def test_only_presets_of_papers_have_full_noise_and_the_norms_of_every_step(preset: str | None) -> None:
    perturb = parse_training([] if preset is None else ["--preset", preset])[0].perturb
    assert (perturb.perturb_draw, perturb.perturb_norm_every) == (("low_rank", 10) if preset is None else ("full", 1))


@pytest.mark.parametrize("file", sorted((SAMPLES / "presets").glob("*.json")), ids=lambda file: file.stem)
def test_every_preset_can_be_read(file: Path) -> None:
    assert TrainConfig().updated_from(file) != TrainConfig()


def test_flat_lora_is_the_default_with_sigma_0_1_and_plain_lora_has_none() -> None:
    assert TrainConfig().perturb.effective_sigma == 0.1
    assert TrainConfig.from_dict({"sigma": 0.05}).perturb.effective_sigma == 0.05
    assert TrainConfig.from_dict({"method": "lora"}).perturb.effective_sigma == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rnak": 4}, "unknown setting.*rnak"),
        ({"rank": 0}, "rank=0 is out of range: it must be between 1 and 1024"),
        ({"rank": 2.5}, "rank=2.5 must be a whole number"),
        ({"rank": True}, "rank=True must be a whole number"),
        ({"rank": None}, "rank=None must be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number"),
        ({"method": "sgd"}, "method='sgd' .*lora, flat-lora"),
        ({"sigma": -0.1}, "sigma=-0.1 is out of range"),
        ({"method": "lora", "sigma": 0.1}, "--method lora has no sigma, but sigma=0.1"),
    ],
)
def test_an_invalid_setting_is_an_error_with_its_name_and_the_allowed_values(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "is not a JSON object"), (None, "cannot be read")]
)
def test_an_unusable_config_file_is_named_in_the_error(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "settings.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"settings.json {message}"):
        parse_training(["--config", str(file)])


@pytest.mark.parametrize("method", [["sam"], "sharper", None])
def test_an_invalid_method_in_a_file_is_named_with_the_file(tmp_path: Path, method: Any) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"method": method}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"settings.json: method="):
        parse_training(["--config", str(file)])


def test_the_error_for_an_unknown_preset_lists_the_presets() -> None:
    known = "bilora_icons, demo, illustrious, klein, low_memory, paper, quality"
    for name in ("nope", "/etc/x", "../presets/paper", "accelerate", "", "Paper"):
        with pytest.raises(ConfigError, match=f"--preset {name} .*: {known}$"):
            parse_training(["--preset", name])


def test_the_error_for_a_file_given_as_preset_names_the_config_flag(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"paper, quality; .*--config"):
        parse_training(["--preset", str(file)])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"rank": 5000}', "rank=5000 is out of range: it must be between 1 and 1024"),
        ('{"rank": "4"}', "rank='4' must be a whole number"),
        ('{"keep_tags": 1}', "--keep_tags"),
        ('{"rnak": 1}', "rnak"),
    ],
)
def test_an_error_in_a_config_file_names_the_file(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    resumed = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
    for arguments in (["--config", str(file)], ["--preset", "paper", "--config", str(file)], resumed):
        with pytest.raises(ConfigError) as raised:
            parse_training(arguments)
        assert fault in str(raised.value)
        assert str(file) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_setting_error_keeps_its_message_when_pickled() -> None:
    """Workers of a comparison send theirs by pickle."""
    with pytest.raises(SettingError) as raised:
        TrainConfig.from_dict({"rank": 0})
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value) == "rank=0 is out of range: it must be between 1 and 1024"


def test_zero_terminal_snr_and_edm_exclude_each_other_as_do_base_dtype_and_quantization() -> None:
    config = TrainConfig.from_dict({"zero_terminal_snr": True, "prediction_type": "v_prediction"})
    with pytest.raises(ConfigError, match=r"--base_dtype .*--quantize_base"):
        config.replace(base_dtype="fp32", quantize_base="nf4")
    with pytest.raises(ConfigError, match=r"--zero_terminal_snr .*--do_edm_style_training"):
        config.replace(do_edm_style_training=True)
