"""`--members`: several LoRAs with different seeds, and the run's result is their average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layouts import as_diffusers_loads
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.config import ConfigError, RunError, StoppedError, TrainConfig
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training import trainer
from flatlora_diffusion.training.trainer import train


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    """Two members of three steps each, saved exactly."""
    return config.replace(members=2, save_dtype="fp32", output_name="fox")


@pytest.fixture(scope="module")
def trained(base: Path, icons: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run with three members, read-only."""
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(icons),
        "output_dir": str(tmp_path_factory.mktemp("members") / "run"),
        "max_train_steps": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "seed": 3,
        "members": 3,
        "save_dtype": "fp32",
        "output_name": "fox",
        "validation_prompt": "an icon",
        "num_validation_images": 1,
    }
    config = TrainConfig.from_dict(settings)
    train(config)
    return config


def folder_of(config: TrainConfig) -> Path:
    return Path(config.run.output_dir)


def effect(base: Path, file: Path) -> dict[str, Tensor]:
    return as_diffusers_loads(base, file)


def test_the_result_adds_the_mean_of_what_its_members_add(trained: TrainConfig, base: Path) -> None:
    folder = folder_of(trained)
    members = [effect(base, folder / f"member-{number}" / LORA_FILE) for number in (1, 2, 3)]
    result = effect(base, folder / LORA_FILE)
    assert all(not torch.equal(members[0][name], members[1][name]) for name in result)
    for name, value in result.items():
        mean = sum(member[name] for member in members) / 3
        assert isinstance(mean, Tensor)
        assert (value - mean).norm() <= 1e-5 * mean.norm(), name


def test_the_first_member_is_the_run_without_members(trained: TrainConfig, tmp_path: Path) -> None:
    alone = trained.replace(members=None, output_dir=str(tmp_path / "alone"), validation_prompt=None)
    first, second = load_file(train(alone)), load_file(folder_of(trained) / "member-1" / LORA_FILE)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_of_members_ends_like_any_run(trained: TrainConfig) -> None:
    """Both files, card, sidecar, preview and events of all steps; the metadata describe the average."""
    folder = folder_of(trained)
    with safe_open(folder / "fox.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == str(3 * trained.adapter.rank)
    for said in (metadata["ss_training_comment"], json.loads((folder / "fox.json").read_text())["description"]):
        assert "average of 3 LoRAs, seeds 3, " in said
    assert "average of 3 LoRAs" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "images" / "step-3-0.png").is_file()
    run = RunDir(folder)
    assert run.ending() is not None
    assert [event["step"] for event in run.steps()] == list(range(9))
    (average,) = [event for event in run.events() if event["event"] == "average"]
    assert (average["members"], average["rank"], average["strength"]) == (3, 12, 1.0)
    assert len(set(average["seeds"])) == 3
    assert run.config()["members"] == 3
    assert run.config()["rank"] == trained.adapter.rank


def test_a_cut_saves_the_best_approximation_of_its_rank_and_logs_the_loss(
    config: TrainConfig, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = config.replace(average_rank=2)
    train(cut)
    folder = folder_of(cut)
    members = [effect(base, folder / f"member-{number}" / LORA_FILE) for number in (1, 2)]
    result, lost, whole = effect(base, folder / LORA_FILE), 0.0, 0.0
    for name, value in result.items():
        mean = sum(member[name] for member in members) / 2
        assert isinstance(mean, Tensor)
        left, values, right = torch.linalg.svd(mean.flatten(1))
        best = ((left[:, :2] * values[:2]) @ right[:2]).view_as(mean)
        assert (value - best).norm() <= 1e-3 * mean.norm(), name
        lost, whole = lost + float((mean - best).square().sum()), whole + float(mean.square().sum())
    (average,) = [event for event in RunDir(folder).events() if event["event"] == "average"]
    assert average["lost"] == pytest.approx((lost / whole) ** 0.5, rel=1e-2)


def test_held_out_images_choose_the_strength(config: TrainConfig, base: Path) -> None:
    """All members hold out the same images; the result is the average times the strength with the lowest loss."""
    held = config.replace(holdout_images=1, checkpointing_steps=1)
    train(held)
    folder = folder_of(held)
    (average,) = [event for event in RunDir(folder).events() if event["event"] == "average"]
    losses = {float(strength): loss for strength, loss in average["heldout_losses"].items()}
    assert average["strength"] == min(losses, key=lambda strength: losses[strength])
    assert len(set(losses.values())) > 1
    away = [
        [row["sha256"] for row in RunDir(folder / f"member-{n}").manifest() if row.get("is_held_out")] for n in (1, 2)
    ]
    assert len(away[0]) == 1
    assert away[0] == away[1]
    members = [effect(base, folder / f"member-{number}" / LORA_FILE) for number in (1, 2)]
    for name, value in effect(base, folder / LORA_FILE).items():
        expected = average["strength"] * sum(member[name] for member in members) / 2
        assert (value - expected).norm() <= 1e-5 * expected.norm()


def test_after_a_failure_the_same_command_trains_what_is_missing(
    config: TrainConfig, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second member fails in its second step; the first is kept, and the result is that of an unbroken run."""
    steps = trainer.train_step
    seeds: list[int] = []

    def failing(state: Any, step: int) -> float:
        seeds.append(state.config.run.seed)
        if len(set(seeds)) == 2 and step == 1:
            raise RunError("the loss is not finite")
        return steps(state, step)

    monkeypatch.setattr(trainer, "train_step", failing)
    with pytest.raises(RunError, match="member 2 of 2"):
        train(config)
    first = (folder_of(config) / "member-1" / LORA_FILE).stat().st_mtime_ns
    monkeypatch.setattr(trainer, "train_step", steps)
    result = load_file(train(config))
    assert (folder_of(config) / "member-1" / LORA_FILE).stat().st_mtime_ns == first
    unbroken = load_file(train(config.replace(output_dir=str(tmp_path / "unbroken"))))
    assert all(torch.equal(result[name], unbroken[name]) for name in unbroken)


def test_a_stop_between_members_keeps_the_trained_members(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = RunDir(folder_of(config)), trainer.train_step

    def stopping(state: Any, step: int) -> float:
        if step == 2:
            run.stop_file.touch()
        return steps(state, step)

    monkeypatch.setattr(trainer, "train_step", stopping)
    with pytest.raises(StoppedError, match="member 1 of 2"):
        train(config)
    assert not (run.folder / LORA_FILE).exists()
    monkeypatch.setattr(trainer, "train_step", steps)
    assert train(config).is_file()


def test_members_are_removed_on_request(config: TrainConfig) -> None:
    path = train(config.replace(max_train_steps=1, remove_members=True))
    assert path.is_file()
    assert not list(path.parent.glob("member-*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"adapter": "full"},
        {"train_text_encoder_ti": True},
        {"members": 1},
        {"members": None, "average_rank": 4},
        {"members": None, "remove_members": True},
    ],
)
def test_settings_without_an_average_are_refused_before_training(config: TrainConfig, changes: dict[str, Any]) -> None:
    name = next(iter(changes)) if changes.get("members", 2) is not None else next(reversed(changes))
    with pytest.raises(ConfigError, match=name):
        config.replace(**changes)
