"""Open settings are resolved from the settings and a few facts, before anything is built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from flatlora_diffusion.config import ConfigError, TrainConfig, settings_with
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.training import trainer
from flatlora_diffusion.training.resolve_config import resolve_after_loading, with_precision, with_seed
from flatlora_diffusion.training.state import prepare

WIDE, TALL = (SimpleNamespace(height=high, width=wide, repeats=1) for high, wide in ((40, 80), (80, 40)))


def of(processes: int = 1, **values: object) -> TrainConfig:
    return resolve_after_loading(
        TrainConfig.from_dict({"seed": 3, **values}), "bf16", 64, 16, [WIDE, TALL, TALL], processes
    )


def test_open_settings_are_resolved_and_no_others_change() -> None:
    given, whole = (
        TrainConfig().to_dict(),
        resolve_after_loading(with_seed(TrainConfig()), "bf16", 64, 16, [WIDE], 1).to_dict(),
    )
    assert {name for name in given if given[name] != whole[name]} == set(settings_with("is_resolved"))
    assert all(whole[name] is not None for name in settings_with("is_resolved"))
    assert (whole["resolution"], whole["mixed_precision"]) == (64, "bf16")


def test_an_unsupported_precision_of_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert with_precision(TrainConfig().replace(mixed_precision="no")).optim.mixed_precision == "no"
    with pytest.raises(ConfigError, match=r"mixed_precision 'fp8'.* --mixed_precision"):
        with_precision(TrainConfig())


def test_given_settings_do_not_change() -> None:
    whole = of(num_train_epochs=5, use_aspect_ratio_buckets=True)
    assert resolve_after_loading(whole, "bf16", 64, 16, [WIDE] * 9, processes=2) == whole
    assert with_seed(whole) is whole


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_train_steps": 7, "num_train_epochs": 5}, 7),
        ({"num_train_epochs": 5, "train_batch_size": 2}, 10),
        ({"num_train_epochs": 5, "train_batch_size": 2, "processes": 2}, 5),
        # three images of two shapes with a batch of two: one batch of each shape
        ({"num_train_epochs": 5, "train_batch_size": 2, "use_aspect_ratio_buckets": True}, 10),
        ({"num_train_epochs": 5, "train_batch_size": 1, "use_aspect_ratio_buckets": True, "repeats": 2}, 30),
    ],
)
def test_the_steps_are_those_given_or_those_of_the_epochs(settings: dict[str, int], steps: int) -> None:
    assert of(**settings).optim.max_train_steps == steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "full", "lora_target_modules": "to_q,conv1"}, "full.* linear .*conv1"),
        ({"adapter": "adalora", "lora_target_modules": "conv2"}, "adalora.* linear .*conv2"),
        ({"adapter": "pissa", "rank": 17}, "rank=17 .* pissa .* at most 16"),
        ({"adapter": "lora-ga", "rank": 9, "lora_target_modules": "to_k"}, "rank=9 .* lora-ga"),
        (
            {"adapter": "pissa", "rank": 99, "lora_block_ranks": "down_blocks=1,mid_block=1,up_blocks=1"},
            r"rank=99 .* at text_encoder\.",
        ),
    ],
)
def test_layers_that_cannot_have_the_adapter_are_refused_before_the_base_is_loaded(
    config: TrainConfig, settings: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "prepare", lambda *_: pytest.fail("the base is loaded here"))
    with pytest.raises(ConfigError, match=message):
        trainer.train(config.replace(train_text_encoder="lora_block_ranks" in settings, **settings))


def test_all_parts_have_the_resolved_config(base: Path, icons: Path, tmp_path: Path) -> None:
    given = TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(base),
            "instance_data_dir": str(icons),
            "output_dir": str(tmp_path / "run"),
            "num_train_epochs": 3,
            "report_to": "none",
        }
    )
    state = prepare(with_seed(given), load_samples(icons).samples)
    assert state.batches.config is state.config
    assert all(state.config.to_dict()[name] is not None for name in settings_with("is_resolved"))
    assert state.total_steps == state.config.optim.max_train_steps == 3 * state.batches.schedule.steps_per_epoch
    assert state.batches.resolution == state.base.resolution


@pytest.mark.parametrize("length", [{"num_train_epochs": 4, "max_train_steps": None}, {"max_train_steps": 4}], ids=str)
def test_the_ramp_lasts_as_long_as_the_training_whether_that_is_given_in_steps_or_in_epochs(
    config: TrainConfig, length: dict[str, int | None]
) -> None:
    given = config.replace(sigma=0.2, sigma_schedule="cosine", train_batch_size=4, **length)
    state = prepare(given, load_samples(Path(str(config.data.instance_data_dir))).samples)
    assert state.total_steps == 4
    assert [state.gradient.sigma_at(step) for step in range(6)] == pytest.approx(
        [0, 0.0292893, 0.1, 0.1707107, 0.2, 0.2]
    )
