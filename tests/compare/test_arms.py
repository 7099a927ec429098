"""Arms as text, the plan of an experiment, and its runs: trained once, resumed, renewed when settings change."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flatlora_diffusion.compare.arms import parse_arm, plan_runs, train_run
from flatlora_diffusion.config import ConfigError, RunError, TrainConfig


@pytest.fixture
def config(config: TrainConfig, tmp_path: Path) -> TrainConfig:
    return config.replace(
        instance_prompt="an icon", output_dir=str(tmp_path / "experiment"), resolution=32, max_train_steps=2, seed=None
    )


def test_an_arm_is_a_method_and_typed_settings() -> None:
    arm = parse_arm("flat-lora:sigma=0.2,lora_target_modules=attn+ff,use_ema=true,rank=8")
    assert (arm.method, arm.role) == ("flat-lora", "arm")
    assert arm.changes == {"sigma": 0.2, "lora_target_modules": "attn+ff", "use_ema": True, "rank": 8}
    assert arm.name == "Flat-LoRA, sigma 0.2, lora_target_modules attn+ff, use_ema True, rank 8"
    assert parse_arm("lora").role == "arm"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dreambooth", "'dreambooth' must begin with one of lora, flat-lora"),
        ("lora:rank", "'rank' in 'lora:rank' is not SETTING=VALUE"),
        ("lora:seed=3", "'seed=3' in 'lora:seed=3' is shared by the whole experiment"),
        ("lora:mixed_precision=bf16", "is shared by the whole experiment"),
        ("sam:sigma=0.2", "'sigma=0.2' in 'sam:sigma=0.2' has no effect on SAM"),
        ("flat-lora:rho=0.2", "'rho=0.2' in 'flat-lora:rho=0.2' has no effect on Flat-LoRA"),
        ("lora:sigma=0.2", "'sigma=0.2' in 'lora:sigma=0.2' has no effect on plain LoRA"),
        ("lora-sam:perturb_draw=full", "'perturb_draw=full' in .* has no effect on LoRA-SAM"),
        ("mixed-noise", "'mixed-noise' must begin with one of .*--method flat-lora"),
        ("lora:rnk=3", "^--arms lora:rnk=3: unknown setting 'rnk'"),
        ("lora:rank=many", "^--arms lora:rank=many: rank='many' must be a whole number"),
        ("lora:use_ema=yes", "use_ema='yes' must be true or false"),
    ],
)
def test_a_wrong_arm_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arm(text)


def test_an_invalid_value_is_reported_with_its_arm(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"^--arms lora:rank=5000: rank=5000 is out of range: it must be between 1"):
        plan_runs(config, [parse_arm("lora:rank=4"), parse_arm("lora:rank=5000")], [0], 1)


def test_runs_of_a_seed_differ_only_by_the_settings_of_their_arms(config: TrainConfig) -> None:
    planned = plan_runs(config, [parse_arm("lora"), parse_arm("flat-lora:sigma=0.2")], [3, 4], points=2)
    assert [(one.arm.key, one.seed) for one in planned] == [
        ("lora", 3),
        ("flat-lora:sigma=0.2", 3),
        ("lora", 4),
        ("flat-lora:sigma=0.2", 4),
    ]
    lora, flat = (one.config.to_dict() for one in planned[:2])
    differing = {name for name in lora if lora[name] != flat[name]}
    assert differing == {"method", "sigma", "output_dir", "output_name"}
    assert flat["checkpointing_steps"] == 1
    assert len({one.run.folder for one in planned}) == 4


def test_an_arm_of_fewer_steps_has_as_many_checkpoints(config: TrainConfig) -> None:
    arms = [parse_arm("lora"), parse_arm("lora:max_train_steps=40")]
    full, half = plan_runs(config.replace(max_train_steps=80), arms, [0], 4)
    assert (full.config.run.checkpointing_steps, half.config.run.checkpointing_steps) == (20, 10)


def test_without_steps_arms_cannot_be_matched(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="max_train_steps is missing"):
        plan_runs(config.replace(max_train_steps=None), [parse_arm("lora")], [0], 1)


def test_a_run_is_trained_once_and_again_when_its_settings_change(
    config: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    (planned,) = plan_runs(config, [parse_arm("lora")], [0], 1)
    assert not planned.is_finished
    assert (planned.remaining_steps, list(planned.files)) == (2, [2])
    train_run(planned)
    assert planned.is_finished
    assert (planned.remaining_steps, list(planned.files)) == (0, [2])
    said = capfd.readouterr()
    assert "lora: 100%" in said.err, "its bar is shown"
    assert "captions" not in said.err, "what is the same for all runs is not told with each of them"
    assert said.out == ""
    written = planned.lora.stat().st_mtime_ns
    train_run(planned)
    assert planned.lora.stat().st_mtime_ns == written
    assert planned.last_step == 2
    for setting in (
        {"rank": 2},
        {"snr_gamma": 5.0},
        {"lora_alpha": 1.0},
        {"max_train_steps": 3},
        {"save_dtype": "bf16"},
    ):
        (changed,) = plan_runs(config.replace(**setting), [parse_arm("lora")], [0], 1)
        assert not changed.is_finished, setting
        assert not changed.is_resumable, "a checkpoint of other settings is not one to go on from"
    (same,) = plan_runs(config.replace(dataloader_num_workers=1), [parse_arm("lora")], [0], 1)
    assert same.is_finished


@pytest.mark.usefixtures("without_a_process")
def test_a_run_with_a_setting_is_not_one_that_leaves_it_open(config: TrainConfig) -> None:
    (planned,) = plan_runs(config.replace(snr_gamma=5.0, sigma=0.2), [parse_arm("flat-lora")], [0], 1)
    train_run(planned)
    assert planned.is_finished
    for left_open in ({"snr_gamma": None}, {"sigma": None}):
        (other,) = plan_runs(
            planned.config.replace(**left_open, output_dir=config.run.output_dir), [planned.arm], [0], 1
        )
        assert other.run.folder == planned.run.folder
        assert not other.is_finished


def test_an_arm_with_rho_rise_calibrates_rho_whatever_the_experiment_has(config: TrainConfig) -> None:
    keys = ["sam:rho_rise=0.01", "sam:rho_rise=0.01,rho=0.3", "sam"]
    planned = plan_runs(config.replace(method="sam", rho=0.1), [parse_arm(key) for key in keys], [0], 1)
    assert [run.config.perturb.rho for run in planned] == [None, 0.3, 0.1]


@pytest.mark.usefixtures("without_a_process")
def test_a_calibrated_run_is_the_run_that_asked_for_it(config: TrainConfig) -> None:
    rising = config.replace(method="sam", sigma=None, rho_rise=0.02)
    (planned,) = plan_runs(rising, [parse_arm("sam")], [0], 1)
    train_run(planned)
    assert planned.run.config()["rho"] is not None
    assert planned.is_finished
    (other,) = plan_runs(rising.replace(rho_rise=0.04), [planned.arm], [0], 1)
    assert not other.is_finished
    saved = planned.run.config()
    planned.run.config_file.write_text(json.dumps({**saved, "rho": None}), encoding="utf-8")
    assert not planned.is_finished, "a run without a rho was made before --rho_rise"


@pytest.mark.usefixtures("without_a_process")
def test_a_checkpoint_of_a_stop_is_not_compared(config: TrainConfig) -> None:
    (planned,) = plan_runs(config.replace(max_train_steps=4), [parse_arm("lora")], [0], points=2)
    wanted = list(planned.files)
    train_run(planned)
    shutil.copytree(planned.run.folder / "checkpoint-2", planned.run.folder / "checkpoint-3")
    assert list(planned.files) == wanted == [2, 4]


@pytest.mark.usefixtures("without_a_process")
def test_a_cut_run_resumes_from_its_checkpoint(config: TrainConfig) -> None:
    (planned,) = plan_runs(config, [parse_arm("lora")], [0], points=2)
    train_run(planned)
    events = [event for event in planned.run.events() if event["event"] != "finished" and event.get("step") != 1]
    planned.run.events_file.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    planned.lora.unlink()
    shutil.rmtree(planned.run.checkpoints()[-1])
    assert planned.is_resumable
    assert planned.remaining_steps == 1
    train_run(planned)
    assert planned.is_finished
    kinds = [event["event"] for event in planned.run.events()]
    assert (kinds.count("start"), kinds.count("step")) == (1, 2)


@pytest.mark.usefixtures("without_a_process")
def test_a_run_that_fails_ends_the_experiment(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (planned,) = plan_runs(config.replace(instance_data_dir=str(tmp_path / "empty")), [parse_arm("lora")], [4], 1)
    with pytest.raises(RunError, match="training LoRA, seed 4 ended with exit code 2"):
        train_run(planned)


def test_an_interruption_reaches_a_run_that_has_only_begun(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planned,) = plan_runs(config, [parse_arm("lora")], [4], 1)
    asked = []

    class Beginning:
        """A trainer that the signal has not reached, and that forgets what was asked before its first step."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.was_interrupted = False

        def __enter__(self) -> Beginning:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self, timeout: float | None = None) -> int:
            if not self.was_interrupted:
                self.was_interrupted = True
                raise KeyboardInterrupt
            asked.append(planned.run.stop_file.exists())
            if len(asked) < 3:
                planned.run.stop_file.unlink(missing_ok=True)
                raise subprocess.TimeoutExpired("train", 0 if timeout is None else timeout)
            return 130

    monkeypatch.setattr("flatlora_diffusion.compare.arms.subprocess.Popen", Beginning)
    with pytest.raises(KeyboardInterrupt):
        train_run(planned)
    assert asked == [True] * 3
