"""What a comparison takes is told before it begins, and one that its disk cannot hold does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_disk import small_disk

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.compare import experiment as module
from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.experiment import Experiment, read_experiment
from flatlora_diffusion.compare.plan_lines import disk_bytes, expected_duration, plan_lines
from flatlora_diffusion.config import CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.memory.disk import disk_need
from flatlora_diffusion.training.trainer import train


@pytest.fixture
def heldout(icons: Path, tmp_path: Path) -> Path:
    """One picture that is not among the icons."""
    folder = tmp_path / "heldout"
    folder.mkdir()
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    (folder / "red.txt").write_text("an icon")
    return folder


@pytest.fixture
def make(base: Path, icons: Path, heldout: Path, tmp_path: Path) -> Any:
    """A function from arms, settings of the comparison and of the training to an experiment."""

    few: dict[str, Any] = {
        "heldout_dir": str(heldout),
        "num_checkpoints": 2,
        "num_prompts": 1,
        "pictures_per_prompt": 1,
    }

    def experiment(*arms: str, own: dict[str, Any] | None = None, **settings: Any) -> Experiment:
        config = TrainConfig.from_dict(
            {
                "pretrained_model_name_or_path": str(base),
                "instance_data_dir": str(icons),
                "output_dir": str(tmp_path / "out"),
                "max_train_steps": 2,
                "rank": 64,
                "resolution": 32,
                "seed": 0,
                "report_to": "none",
                **settings,
            }
        )
        return read_experiment(config, CompareConfig(arms=arms, **(few | (own or {}))))

    return experiment


def trainings(experiment: Experiment) -> str:
    """The line that counts them."""
    return next(line for line in plan_lines(experiment) if "in all" in line)


def test_the_trainings_are_counted(make: Any) -> None:
    assert trainings(make("lora", "sam")) == "3 trainings in all"
    assert trainings(make("lora", "flat-lora", own={"num_seeds": 5})) == "13 trainings in all"
    assert trainings(make("lora")) == "2 trainings in all"
    without = make("lora", "flat-lora", own={"controls": False})
    assert trainings(without) == "2 trainings in all"
    assert not any(line.startswith("4.") for line in plan_lines(without))


def test_arms_with_other_steps_are_named(make: Any) -> None:
    lines = list(plan_lines(make("lora", "sam:max_train_steps=4")))
    assert "2 to 4 steps each" in lines[1]


def test_finished_work_is_not_counted(make: Any) -> None:
    experiment = make("lora")
    before = disk_bytes(experiment)
    (first,) = experiment.arm_runs
    train(first.config)
    assert trainings(experiment) == "2 trainings in all; 1 are done"
    filled = sum(file.stat().st_size for file in first.run.folder.rglob("*") if file.is_file())
    assert before - disk_bytes(experiment) == pytest.approx(filled, rel=0.15)
    assert "from the steps of its earlier runs" in expected_duration(experiment)


def test_each_arm_is_counted_with_its_own_rank_and_class_images_once(make: Any, tmp_path: Path) -> None:
    small, large = (make("lora", f"lora:rank={rank}") for rank in (2, 128))
    needs = [disk_need(one.arm_runs[1].config) for one in (small, large)]
    two, many = (need.result + 2 * need.checkpoint for need in needs)
    assert disk_bytes(large) - disk_bytes(small) == many - two
    prior = {"with_prior_preservation": True, "class_prompt": "an icon", "class_data_dir": str(tmp_path / "class")}
    with_images = make("lora", **prior, num_class_images=1000)
    assert disk_bytes(with_images) - disk_bytes(make("lora")) == pytest.approx(1000 * 1.6 * 32**2, rel=0.01)


def test_the_time_of_a_cluster_is_not_estimated(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check_workers", lambda *_: None)
    monkeypatch.setattr(module, "load_evaluator", lambda *_: pytest.fail("nothing is measured here"))
    assert "cluster" in expected_duration(make("lora", own={"cluster": "auto"}))


def test_parallel_trainings_are_said_to_take_less(make: Any) -> None:
    assert "less with 2 trainings in parallel" in expected_duration(make("lora", own={"workers": 2}))


def test_a_comparison_that_does_not_fit_on_the_disk_is_refused(make: Any, tmp_path: Path) -> None:
    needed = disk_bytes(make("lora", "sam"))
    with small_disk(tmp_path / "disk", needed // 1024 - 1) as disk:
        experiment = make("lora", "sam", output_dir=str(disk / "out"))
        with pytest.raises(ConfigError, match=r"output_dir=.*disk.out.* free, .* 3 trainings"):
            list(plan_lines(experiment))
        assert not any(disk.rglob("seed-*"))
    with small_disk(tmp_path / "disk", needed // 1024 + 64) as disk:
        assert list(plan_lines(make("lora", "sam", output_dir=str(disk / "out"))))


def test_the_command_says_so_in_one_sentence(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: PlannedRun, on_wait: None) -> None:
        pytest.fail("it was begun")

    monkeypatch.setattr(module, "train_run", fail)
    config = make("lora").config
    names = ("pretrained_model_name_or_path", "instance_data_dir", "max_train_steps", "rank", "resolution")
    flags = [f"--{name}={config.to_dict()[name]}" for name in names]
    with small_disk(tmp_path / "disk", 64) as disk:
        heldout = shutil.copytree(tmp_path / "heldout", tmp_path / "more")
        assert main(["compare", *flags, f"--heldout_dir={heldout}", f"--output_dir={disk / 'out'}"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "output_dir=" in said[0]
