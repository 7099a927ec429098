"""Settings and values of earlier versions: an error on the command line, ignored in saved runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flatlora_diffusion.commands.train_flags import parse_training
from flatlora_diffusion.config import METHODS, ConfigError, TrainConfig
from flatlora_diffusion.config.removed import SETTINGS, VALUES
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.resolve_config import resolve_before_loading

RENAMED = {("adapter", "dora"): "use_dora", ("adapter", "rslora"): "use_rslora"}


def saved_run(folder: Path, **removed: Any) -> RunDir:
    run = RunDir(folder)
    run.start({**TrainConfig.from_dict({"output_dir": str(folder)}).to_dict(), **removed}, [])
    (folder / "checkpoint-2").mkdir()
    return run


def test_no_current_setting_is_listed_as_removed() -> None:
    assert not SETTINGS.keys() & TrainConfig().to_dict().keys()
    assert not [value for name, value in VALUES if name == "method" and value in METHODS]


def test_the_error_for_a_removed_flag_or_value_names_its_replacement() -> None:
    for name, removed in SETTINGS.items():
        with pytest.raises(ConfigError, match=f"--{name}.*{removed.remedy}"):
            parse_training([f"--{name}", "0.1"])
    for (name, value), removed in VALUES.items():
        with pytest.raises(ConfigError, match=f"--{name} {value}.*{removed.remedy}"):
            parse_training([f"--{name}", value])


def test_a_saved_run_with_any_removed_setting_opens(tmp_path: Path) -> None:
    settings: list[tuple[str, Any]] = [*((name, 0.3) for name in SETTINGS), *VALUES]
    for place, (name, value) in enumerate(settings):
        run = saved_run(tmp_path / str(place), **{name: value})
        config = TrainConfig.from_dict(run.config())
        assert config == TrainConfig().updated_from(run.config_file)
        assert getattr(config.adapter, RENAMED.get((name, value), "rank"))


def test_a_removed_setting_without_effect_is_dropped_without_a_warning(tmp_path: Path) -> None:
    nothing = {name: removed.without_effect for name, removed in SETTINGS.items()}
    run = saved_run(tmp_path, **nothing)
    assert run.removed_settings() == []
    assert TrainConfig.from_dict(run.config()).to_dict().keys() == TrainConfig().to_dict().keys()


def test_a_run_with_a_removed_method_is_not_resumed(tmp_path: Path) -> None:
    run = saved_run(tmp_path, method="obar", bar_strength=0.5)
    config = TrainConfig().updated_from(run.config_file)
    assert (config.perturb.method, config.perturb.bar_strength) == ("nbar", 0.5)
    with pytest.raises(ConfigError, match=r"method=obar.*--init_lora"):
        resolve_before_loading(config.replace(output_dir=str(tmp_path), resume_from_checkpoint="latest"), run)


def test_a_renamed_value_keeps_its_meaning(tmp_path: Path) -> None:
    run = saved_run(tmp_path, adapter="dora")
    assert run.removed_settings() == []
    assert json.loads(run.config_file.read_text(encoding="utf-8"))["adapter"] == "dora"
    assert TrainConfig.from_dict(run.config()).adapter.use_dora
