"""Saved settings: no absolute paths, and enough to repeat a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flatlora_diffusion.commands import command_line
from flatlora_diffusion.commands.train_flags import parse_training
from flatlora_diffusion.config import SAMPLES, TrainConfig
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.saved_config import changed_names, expand_paths, portable


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a project as working folder."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    project = tmp_path / "home" / "project"
    project.mkdir(parents=True)
    monkeypatch.chdir(project)
    return tmp_path / "home"


def save(folder: Path, **settings: Any) -> RunDir:
    run = RunDir(folder)
    run.start(TrainConfig.from_dict(settings).to_dict(), [])
    return run


def test_a_saved_run_keeps_paths_in_the_working_folder_and_the_home(home: Path) -> None:
    run = save(
        home / "runs" / "x",
        instance_data_dir=str(home / "pictures"),
        class_data_dir=str(home / "project" / "dogs"),
        output_dir=str(home / "runs" / "x"),
    )
    saved = run.config_file.read_text(encoding="utf-8")
    assert json.loads(saved)["instance_data_dir"] == "~/pictures"
    assert str(home.parent) not in saved
    config = parse_training(["--config", str(run.config_file)])[0]
    assert config.data.instance_data_dir == str(home / "pictures")
    assert config.data.class_data_dir == "dogs"
    assert config.run.output_dir == str(home / "runs" / "x")


def test_saved_paths_of_samples_work_in_any_installation(home: Path) -> None:
    icons = SAMPLES / "icons_3d"
    run = save(home / "x", instance_data_dir=str(icons), output_dir="x")
    assert json.loads(run.config_file.read_text(encoding="utf-8"))["instance_data_dir"] == "samples/icons_3d"
    assert parse_training(["--config", str(run.config_file)])[0].data.instance_data_dir == str(icons)
    assert parse_training(["--preset", "demo"])[0].data.instance_data_dir == str(icons)
    assert expand_paths({"instance_data_dir": "samples/mine"}) == {"instance_data_dir": "samples/mine"}
    Path("samples/icons_3d").mkdir(parents=True)
    mine = parse_training(["--config", str(run.config_file)])[0].data.instance_data_dir
    assert mine == "samples/icons_3d", "the user's own folder of that name goes before"


def test_the_error_for_unsaved_paths_lists_the_settings_to_give_again(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(
        tmp_path / "x",
        instance_data_dir=str(tmp_path / "pictures"),
        init_lora=str(tmp_path / "old.safetensors"),
        output_dir=str(tmp_path / "x"),
    )
    assert command_line.train_main(["--config", str(run.config_file)]) == 2
    error = capsys.readouterr().err
    assert "give --instance_data_dir (it was .../pictures), --init_lora (it was .../old.safetensors) again" in error
    assert str(tmp_path) not in error
    again = ["--instance_data_dir", str(tmp_path / "pictures"), "--init_lora", "x"]
    config = parse_training(["--config", str(run.config_file), *again])[0]
    assert config.run.output_dir == str(tmp_path / "x"), "it is beside the file"


def test_a_run_that_was_resumed_is_repeated_from_its_start(tmp_path: Path) -> None:
    run = save(tmp_path / "x", resume_from_checkpoint="latest", rank=2)
    assert parse_training(["--config", str(run.config_file)])[0] == TrainConfig.from_dict({"rank": 2})


def test_a_resumed_run_keeps_the_settings_that_are_not_given(tmp_path: Path) -> None:
    save(tmp_path / "x", learning_rate=0.01, rank=2, seed=4)
    resume = ["--output_dir", str(tmp_path / "x"), "--resume_from_checkpoint", "latest"]
    config = parse_training([*resume, "--seed", "5"])[0]
    assert (config.optim.learning_rate, config.adapter.rank, config.run.seed) == (0.01, 2, 5)
    assert parse_training([*resume[:2]])[0].adapter.rank == TrainConfig().adapter.rank


@pytest.mark.parametrize(
    ("saved", "now", "is_same"),
    [
        ("bases/sdxl", "/work/bases/sdxl", True),
        (".../sdxl", "/work/bases/sdxl", True),
        ("~/bases/sdxl", "../bases/sdxl", True),
        ("sdxl", "/work/bases/other", False),
        ("one/sdxl", "two/sdxl", False),
        ("tiny", "tiny", True),
        (None, "vae", False),
    ],
)
def test_a_path_is_the_same_from_every_working_folder(saved: str | None, now: str, is_same: bool) -> None:
    for name in ("pretrained_model_name_or_path", "init_lora"):
        assert changed_names({name: now}, {name: saved}) == ([] if is_same else [name])


def test_saved_settings_have_no_tokens_and_no_absolute_paths(tmp_path: Path) -> None:
    values = {"hub_token": "hf_x", "output_dir": str(tmp_path), "rank": 2, "resume_from_checkpoint": "latest"}
    saved = portable(values)
    assert saved == {"output_dir": f".../{tmp_path.name}", "rank": 2, "resume_from_checkpoint": None}
